"""The application: OpenAI's endpoints over minnow's engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minnow import __version__
from minnow.serving import admin, chat, completions, embeddings, web_chat
from minnow.serving.config import ServingConfig
from minnow.serving.errors import as_api_error, install_handlers
from minnow.serving.metrics import Metrics
from minnow.serving.models import Models, ServedModel
from minnow.serving.request_id import HEADER, RequestIds
from minnow.serving.security import Guard
from minnow.serving.state import ServerState


def create_app(
    models: Sequence[ServedModel], config: ServingConfig, *, hosts: Collection[str] | None = None
) -> FastAPI:
    """The server for `models`, whose engines it closes in the end.

    hosts: names that clients may call it by; None for any. The web chat lies at `/`; what
    else is mounted afterwards stands behind the same guard.
    """
    chat_tools = web_chat.chat_tools(config.chat_table)
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        for engine in {model.engine for model in models}:  # a model and its adapters share one
            await engine.drain(0)
            engine.close()

    app = FastAPI(
        title="minnow",
        version=__version__,
        summary="OpenAI's API for models that minnow trained",
        lifespan=lifespan,
        # Their pages load scripts from elsewhere; /openapi.json stays.
        docs_url=None,
        redoc_url=None,
    )
    app.state.minnow = ServerState(
        models=Models(models, metrics), config=config, metrics=metrics, chat_tools=chat_tools
    )
    install_handlers(app)
    for module in (chat, completions, embeddings, admin, web_chat):
        app.include_router(module.router)
    app.add_middleware(Guard, api_key=config.api_key, hosts=hosts, max_body_bytes=int(config.max_body_mib * 2**20))
    app.add_middleware(_AnswerFailures)  # within CORS, or a browser would hide the reason from its page
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's JavaScript client sends a dozen of its own (X-Stainless-...)
            expose_headers=["Retry-After", HEADER],
        )
    app.add_middleware(_CountRequests, metrics=metrics, paths=frozenset(_paths(app)))
    app.add_middleware(RequestIds)  # around all, so that no answer is without
    _describe_errors_as_they_are(app)
    return app


class _AnswerFailures:
    """Makes an error that nothing else has answered one of OpenAI's schema."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = False

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = answered or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if answered or scope["type"] != "http":
                raise
            await as_api_error(error).response()(scope, receive, send)


class _CountRequests:
    """Counts requests by path and status; paths that are none of ours are one."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # What was refused before it found its endpoint is told by its own path.
                own = scope["path"] if scope["path"] in self._paths else "other"
                path = getattr(scope.get("route"), "path_format", own)
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted)


def _paths(app: FastAPI) -> list[str]:
    return list(app.openapi()["paths"])


def _describe_errors_as_they_are(app: FastAPI) -> None:
    """Take FastAPI's own 422 out of the description: what is not valid gets a 400 in OpenAI's schema."""
    described: dict[str, Any] = app.openapi()
    for operations in described["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        described["components"]["schemas"].pop(name, None)
