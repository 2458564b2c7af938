"""The web chat: one page of our own at `/`, which talks to this server and to nobody else.

Two walls keep what a model writes from running in the browser: the page builds its DOM from text nodes only, and the
Content-Security-Policy forbids every script that is not a file of this server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse
from typing_extensions import TypedDict

from minnow.config import UserError
from minnow.serving.errors import APIError
from minnow.serving.state import documented, state_of
from minnow.serving.validation import Strict
from minnow.tokenizer.bytelevel import valid_unicode
from minnow.tokenizer.chat import ToolCall
from minnow.tools import CALCULATOR, CLOCK, Tool, call_tool, lookup_tool

_FOLDER = Path(__file__).parent / "web"
_FILES = {path.name: path for path in _FOLDER.iterdir() if path.suffix in (".js", ".css")}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version of minnow is seen at once
}

router = APIRouter(tags=["web chat"])


def chat_tools(table: str | None) -> tuple[Tool, ...]:
    """The tools that the web chat may run: a calculator, a clock and, with a table, a look-up.

    table: a JSON file of objects {who or what: {property: value}}, all strings. UserError if it is something else.
    """
    if table is None:
        return (CALCULATOR, CLOCK)
    try:
        rows = json.loads(Path(table).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"chat_table {table}: cannot be read as JSON ({error})") from error
    right = isinstance(rows, dict) and all(
        isinstance(row, dict) and all(isinstance(value, str) for value in row.values()) for row in rows.values()
    )
    if not right:
        raise UserError(f'chat_table {table}: must look like {{"minnow": {{"colour": "silver"}}}}, with strings only')
    return (CALCULATOR, CLOCK, lookup_tool(rows))


class ToolBody(Strict):
    """POST /chat/tool."""

    name: str
    arguments: str
    """A JSON object, as text: what the model wrote."""


class OfferedTools(TypedDict):
    """The tools of the web chat, as OpenAI's `tools`."""

    tools: list[dict]


class ToolResult(TypedDict):
    """What the tool said, or {"error": ...}: text for the model."""

    content: str


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page."""
    return _file(_FOLDER / "index.html")


@router.get("/chat/tools", response_model=None, responses=documented(OfferedTools))
async def offered(request: Request) -> OfferedTools:
    """What the web chat may let a model call."""
    return {"tools": [tool.schema for tool in state_of(request).chat_tools]}


@router.post("/chat/tool", response_model=None, responses=documented(ToolResult))
async def run_tool(body: ToolBody, request: Request) -> ToolResult:
    """Answer a model's call of one of these tools; what is wrong with the call is told to the model."""
    # A call may hold half a surrogate pair, and what is said of it may quote that.
    return {"content": valid_unicode(await asyncio.to_thread(_call, state_of(request).chat_tools, body))}


@router.get("/chat/{name}", include_in_schema=False)
async def file(name: str) -> FileResponse:
    """What the page is made of."""
    if name not in _FILES:
        raise APIError(404, f"There is no file {name}.")
    return _file(_FILES[name])


def _file(path: Path) -> FileResponse:
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)


def _call(tools: Sequence[Tool], body: ToolBody) -> str:
    try:
        arguments = json.loads(body.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return json.dumps({"error": "the arguments are not a JSON object"})
    return call_tool(tools, ToolCall(body.name, arguments))
