"""What the endpoints share, and how they describe themselves in OpenAPI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request

from minnow.serving.config import ServingConfig
from minnow.serving.errors import ErrorBody
from minnow.serving.metrics import Metrics
from minnow.serving.models import Models
from minnow.tools import Tool


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """One server's models, settings and counters; it hangs on the application as `app.state.minnow`."""

    models: Models
    config: ServingConfig
    metrics: Metrics
    chat_tools: tuple[Tool, ...]
    """What the web chat may run for a model."""


def state_of(request: Request) -> ServerState:
    """The state of the server that got the request."""
    state: ServerState = request.app.state.minnow
    return state


_ERRORS = {
    400: "The request makes no sense, or its prompt does not fit the context",
    401: "The API key is missing or wrong",
    403: "Not allowed on this server",
    404: "No such model",
    413: "The body is too large",
    429: "Too many answers are under way; Retry-After says when to try again",
    500: "The server failed",
    503: "The server is shutting down, or out of memory",
}


def documented(answer: Any, *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` of an endpoint: its answer, an event stream too if it has one, and the errors."""
    success: dict[str, Any] = {"model": answer, "description": "The answer"}
    if stream:
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        success["content"] = {"text/event-stream": {"schema": event}}
    errors: dict[int | str, dict[str, Any]] = {}
    for status, text in _ERRORS.items():
        errors[status] = {"model": ErrorBody, "description": text}
    return {200: success, **errors}
