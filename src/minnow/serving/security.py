"""What stands before every endpoint: the key, the size of a body, the name of the host."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Collection

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minnow.serving.errors import APIError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN_PATHS = frozenset({"/health"})
"""What a load balancer may ask without a key."""


class Guard:
    """Lets a request through that has the key, comes under an allowed host name and has a body of bearable size.

    api_key: None asks for none. hosts: names that the Host header may have, None for any; a server without a
    key on this machine only answers to the machine's own names, or any web page could reach it under a
    name that it points to 127.0.0.1 (DNS rebinding).
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, hosts: Collection[str] | None, max_body_bytes: int
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = hosts
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request or hand it on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers.get("host", ""))
            self._check_key(scope["path"], headers.get("authorization", ""))
            self._check_length(headers.get("content-length", ""))
        except APIError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await error.response()(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _check_host(self, host: str) -> None:
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts is not None and name.lower() not in self._hosts:
            raise APIError(
                403,
                f"This server only answers to {', '.join(sorted(self._hosts))}; with an API key, to any name.",
            )

    def _check_key(self, path: str, authorization: str) -> None:
        if self._key is None or path in OPEN_PATHS:
            return
        if hmac.compare_digest(_credentials(authorization), self._key):
            return
        message = "Incorrect API key provided." if authorization else "You did not provide an API key."
        # A browser asks for a password where the scheme is Basic: that is how people open the web chat.
        scheme = "Bearer" if path.startswith(("/v1/", "/admin/")) else 'Basic realm="minnow"'
        raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": scheme})

    def _check_length(self, length: str) -> None:
        if length.isascii() and length.isdigit() and int(length[:20]) > self._max_body_bytes:
            raise APIError(413, self._too_large)

    @property
    def _too_large(self) -> str:
        return f"The request's body is larger than this server takes ({self._max_body_bytes} bytes)."

    def _counted(self, receive: Receive) -> Receive:
        """`receive` that ends a body which did not say its length and turns out too large."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_body_bytes:
                    raise HTTPException(413, self._too_large)
            return message

        return counted


def _credentials(authorization: str) -> bytes:
    """The key in an Authorization header: a bearer token, or the password of basic authentication."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("utf-8", "replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value).partition(b":")[2]
        except ValueError:  # also of characters that are not ASCII, which is no binascii.Error
            pass
    return b""
