"""Servers on real sockets, in this process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
import uvicorn
from fastapi import FastAPI

from minnow.engine import Engine
from minnow.engine.async_engine import AsyncEngine
from minnow.serving import ServedModel, ServingConfig, create_app
from minnow.serving.connection import KEEP_ALIVE_SECONDS


@dataclass
class Running:
    """A server and how to reach it."""

    app: FastAPI
    url: str
    engines: dict[str, AsyncEngine]

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options))

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options))


def served(folders: Mapping[str, Path], max_answers: int = 256, dtype: torch.dtype | None = None) -> list[ServedModel]:
    """The models as `minnow serve` runs them: packed copies of their weights."""
    return [
        ServedModel(
            name=name,
            folder=folder,
            engine=AsyncEngine(Engine.from_pretrained(folder, dtype=dtype, frozen=True), max_answers=max_answers),
        )
        for name, folder in folders.items()
    ]


@contextmanager
def serving(
    folders: Mapping[str, Path],
    config: ServingConfig | None = None,
    hosts: frozenset[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Running]:
    """Serve the models at a free port until the block ends."""
    config = config or ServingConfig()
    app = create_app(served(folders, config.max_answers, dtype), config, hosts=hosts)
    with running_app(app) as running:
        yield running


@contextmanager
def running_app(app: FastAPI) -> Iterator[Running]:
    """Serve an application at a free port until the block ends."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Running(app, url, {model.name: model.engine for model in app.state.minnow.models})
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    """Wait for something another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
