"""Answers over a connection that the client may leave at any time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from minnow.serving.errors import APIError, as_api_error

R = TypeVar("R")

KEEP_ALIVE_SECONDS = 120
"""How long an idle connection stays open: longer than clients and proxies usually keep one (OpenAI's client 5 seconds,
uvicorn's own default too; nginx 60; Go's client 90), or a request just then meets a connection being closed."""


class EventStream(StreamingResponse):
    """Server-sent events as OpenAI sends them: `data: JSON`, an empty line, `data: [DONE]` in the end.

    An error after the first event becomes an event itself: the status has been sent. When the client leaves,
    `close` is called at once.
    """

    def __init__(self, events: AsyncGenerator[list[Mapping[str, Any]], None], close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may collect events
        self._lines = _lines(events)
        self._close = close
        super().__init__(self._lines, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. `close` is called however this ends, also when it never began."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _lines(events: AsyncGenerator[list[Mapping[str, Any]], None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        try:
            async for batch in events:
                yield b"".join(map(_line, batch))
        except Exception as error:
            yield _line(as_api_error(error).body())
            return
    yield b"data: [DONE]\n\n"


# Line ends to Unicode but not to JSON, which leaves them as they are: many clients split lines there.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def _line(event: Mapping[str, Any]) -> bytes:
    text = json.dumps(event, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return b"data: " + text.encode() + b"\n\n"


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """The result of `work`, which is cancelled when the client closes the connection."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(499, "The client closed the connection.")
    finally:
        gone.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
