"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from typing_extensions import TypedDict

from minnow.config import UserError
from minnow.out_of_memory import OutOfMemory
from minnow.tokenizer.bytelevel import valid_unicode

_log = logging.getLogger(__name__)


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    type: str
    """invalid_request_error, rate_limit_error or server_error."""
    param: str | None
    """The field of the request that is at fault."""
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer with a status of 400 or more."""

    error: ErrorDetail


class APIError(Exception):
    """An answer with an error status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> ErrorBody:
        """What the client reads."""
        return error_body(self.status, str(self), param=self.param, code=self.code)

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> ErrorBody:
    """The body for a status; text that came from the client is made encodable."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    param = None if param is None else valid_unicode(param)
    return {"error": {"message": valid_unicode(message), "type": kind, "param": param, "code": code}}


def as_api_error(error: Exception) -> APIError:
    """Any exception as the answer to the client; what only we can get wrong is logged and not told."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, OutOfMemory):
        return APIError(503, "The server ran out of memory. Try again later, or ask for less at once.")
    if isinstance(error, UserError):
        return APIError(400, str(error))
    _log.error("a request failed", exc_info=error)
    return APIError(500, "The server had an error while it processed your request.")


def install_handlers(app: FastAPI) -> None:
    """Make every failure inside `app` an error of OpenAI's schema."""

    @app.exception_handler(APIError)
    async def api_error(_: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        return as_api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(error.errors()).response()

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{message}: {request.method} {request.url.path}"
        body = error_body(error.status_code, message)
        return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failure(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()


def validation_error(errors: Any) -> APIError:
    """Pydantic's errors as one, with the field's path: `messages.0.content: Input should be ...`."""
    # Where a value fits no member of a union there is one error a member: the deepest is about the likeliest one.
    same_field = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    error = max(same_field, key=lambda error: len(error["loc"]))
    path = [str(part) for part in _without_tags(error["loc"]) if part != "body" and not _MEMBER.fullmatch(str(part))]
    reason = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        return APIError(400, f"We could not parse the JSON body of your request: {error['ctx']['error']}.")
    if error["type"] == "misfit":
        return APIError(400, reason, param=error["ctx"]["param"])
    if not path and error["type"] == "value_error":
        return APIError(400, f"The request's body is not valid: {reason}.")
    if not path:
        return APIError(400, f"The request's body is not valid: {reason}. Send a JSON object as application/json.")
    if error["type"] == "extra_forbidden":
        name = ".".join(path)
        return APIError(400, f"Unrecognized request argument supplied: {name}", param=name)
    return APIError(400, f"Invalid value for '{'.'.join(path)}': {reason}", param=path[0])


def _without_tags(loc: Sequence[str | int]) -> list[str | int]:
    """A path without what chose between the members of a union: a message's role, a response format's type."""
    return [
        part
        for i, part in enumerate(loc)
        if not (i >= 2 and loc[i - 2] == "messages") and not (i >= 1 and loc[i - 1] == "response_format")
    ]


# How pydantic names the members of a union in a path: str, list[int], literal['a','b'], constrained-str, TextPart.
_MEMBER = re.compile(r"str|int|float|bool|none|.*[\[(-].*|[A-Z].*")
