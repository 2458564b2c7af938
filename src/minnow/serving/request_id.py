"""The id of every request: in the answer's `x-request-id` header, and in what the server logs about it."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"

# What a client may call its request: every usual kind of id, and nothing that a log, a shell or a page would read.
_USABLE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_current = ContextVar("minnow_request_id", default="-")


def request_id() -> str:
    """The id of the request that is being answered here."""
    return _current.get()


class RequestIds:
    """Gives every request an id, its client's own where that sent a usable one, and says it in every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, in a task that knows its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        identity = given if _USABLE.fullmatch(given) else f"req_{secrets.token_hex(16)}"

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = identity
            await send(message)

        token = _current.set(identity)
        try:
            await self._app(scope, receive, named)
        finally:
            _current.reset(token)
