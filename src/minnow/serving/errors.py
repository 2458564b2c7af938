"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from typing_extensions import TypedDict

from minnow.config import UserError
from minnow.out_of_memory import OutOfMemory, is_out_of_memory
from minnow.serving.request_id import request_id
from minnow.serving.validation import AT_FAULT
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
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        _log.error("request %s found no memory", request_id())
        return APIError(503, "The server ran out of memory. Try again later, or ask for less at once.")
    if isinstance(error, UserError):
        return APIError(400, str(error))
    _log.error("request %s failed", request_id(), exc_info=error)
    return APIError(500, "The server had an error while it processed your request.")


def install_handlers(app: FastAPI) -> None:
    """Make what the endpoints refuse, and FastAPI itself, an error of OpenAI's schema."""

    @app.exception_handler(APIError)
    async def api_error(_: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        return as_api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(error.errors(), error.body).response()

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{message}: {request.method} {request.url.path}"
        body = error_body(error.status_code, message)
        return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))


def validation_error(errors: Any, body: Any) -> APIError:
    """Pydantic's errors about `body` as one, with the field's path: `messages.0.content: Input should be ...`."""
    # Where a value fits no member of a union there is one error a member: the deepest is about the likeliest one, and
    # a wrong value is nearer to it than a wrong type.
    same_field = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    error = max(same_field, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    reason = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        return APIError(400, f"We could not parse the JSON body of your request: {error['ctx']['error']}.")
    path = error["ctx"]["where"].split(".") if error["type"] == AT_FAULT else _path(error, body)
    if not path:
        advice = "" if isinstance(body, dict) else " Send a JSON object as application/json."
        return APIError(400, f"The request's body is not valid: {reason}.{advice}")
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        return APIError(400, f"Unrecognized request argument supplied: {name}", param=name)
    return APIError(400, f"Invalid value for '{name}': {reason}", param=path[0])


def _path(error: Any, body: Any) -> list[str]:
    """The keys that lead to the fault. Pydantic puts names for members of unions between them, which no body has."""
    parts = error["loc"][1:]  # the first is "body"
    path, value = [], body
    for part in parts:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            path.append(str(part))
            value = value[part]
    if error["type"] == "missing" and parts:
        path.append(str(parts[-1]))
    return path
