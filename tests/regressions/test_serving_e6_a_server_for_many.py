"""E6: one blocking generate in an `async def`, threads that shared a model without a lock, max_tokens not honoured,
chunks without id, model, index or role, no [DONE], no usage, no /v1/models, a default address open to everybody.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from minnow.engine import Engine
from minnow.engine.async_engine import AsyncEngine
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.serving import ServedModel, ServingConfig, create_app
from minnow.stages.serve import Config
from minnow.tokenizer.train import train_tokenizer


@pytest.fixture
def app() -> FastAPI:
    tokenizer = train_tokenizer(["fish"] * 3, 288)
    config = ModelConfig(
        vocab_size=288, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    engine = AsyncEngine(Engine(CausalLM(config), tokenizer))
    return create_app([ServedModel(name="m", folder=Path(), engine=engine)], ServingConfig())


BODY = {"model": "m", "messages": [{"role": "user", "content": "fish"}], "max_tokens": 7, "ignore_eos": True}


def test_concurrent_streams_are_whole_and_in_openais_form(app: FastAPI) -> None:
    async def stream(client: httpx.AsyncClient, seed: int) -> str:
        body = BODY | {"stream": True, "seed": seed, "stream_options": {"include_usage": True}}
        return (await client.post("/v1/chat/completions", json=body)).text

    async def both() -> list[str]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://m") as client:
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "m"
            together = await asyncio.gather(*(stream(client, seed) for seed in range(8)))
            assert [said(text) for text in together] == [said(await stream(client, seed)) for seed in range(8)]
            return list(together)

    for text in asyncio.run(both()):
        *events, done, nothing = text.split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert all(chunk["object"] == "chat.completion.chunk" and chunk["model"] == "m" for chunk in chunks)
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert chunks[-1]["usage"]["completion_tokens"] == 7


def said(text: str) -> str:
    chunks = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def test_only_this_machine_comes_in_by_default() -> None:
    assert Config(models=("m",)).host == "127.0.0.1"
