"""What the real `openai` client makes of the server."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from minnow.engine import Engine, SamplingParams
from minnow.model.attention import CausalAttention
from minnow.rl.remote_engine import RemoteEngine, RemoteEngineConfig
from minnow.serving import embeddings
from minnow.serving.connection import EventStream
from tests.engine.engine_helpers import NoTorch

from ..stages.stage_helpers import save_random_model
from .serving_helpers import Running, serving

ASK: list[Any] = [{"role": "user", "content": "你好"}]


def test_a_chat_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="parrot", messages=ASK, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "parrot"
    assert answer.created > 1.7e9
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "小鱼 swims")
    assert choice.message.tool_calls is None
    assert answer.usage is not None
    # <|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n, however many tokens that is.
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_openais_event_by_event(running: Running) -> None:
    body = {
        "model": "parrot",
        "messages": ASK,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"  # or a proxy may hold the events back
    assert answer.headers["cache-control"] == "no-cache"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for field in ("id", "created", "model", "system_fingerprint"):
        assert len({chunk[field] for chunk in chunks}) == 1
    first, *middle, last, counts = chunks
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    for chunk in middle:
        (choice,) = chunk["choices"]
        assert choice["finish_reason"] is None
        assert list(choice["delta"]) == ["content"]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "小鱼 swims"
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert counts["choices"] == []
    assert counts["usage"]["completion_tokens"] >= len(middle)


def test_no_character_of_an_answer_ends_a_line() -> None:
    """A client that splits at Unicode's line ends, as httpx does, must not cut an event in two."""

    async def events() -> AsyncGenerator[list[dict[str, str]], None]:
        yield [{"content": "a\x85b\u2028c\u2029d\x1ce\x0bf小"}]

    async def body() -> str:
        return b"".join([line async for line in EventStream(events(), lambda: None).body_iterator]).decode()

    first, *rest = asyncio.run(body()).splitlines()
    assert rest == ["", "data: [DONE]", ""]
    assert json.loads(first.removeprefix("data: ")) == {"content": "a\x85b\u2028c\u2029d\x1ce\x0bf小"}


def test_without_asking_there_is_no_usage_in_a_stream(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="parrot", messages=ASK, temperature=0, stream=True))
    assert all(len(chunk.choices) == 1 and "usage" not in chunk.model_fields_set for chunk in chunks)
    parts = list(client.completions.create(model="noise", prompt="x", max_tokens=3, stream=True))
    assert all(len(part.choices) == 1 and "usage" not in part.model_fields_set for part in parts)


def test_reasoning_is_apart(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "thinker", "messages": ASK, "temperature": 0}
    think = {"chat_template_kwargs": {"enable_thinking": True}}
    message = client.chat.completions.create(**options, extra_body=think).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm 小", "yes")
    chunks = list(client.chat.completions.create(**options, extra_body=think, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm 小"
    assert "".join(delta.content or "" for delta in deltas) == "yes"
    usage = client.chat.completions.create(**options, reasoning_effort="low").usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens - len("yes") - 1
    held = client.chat.completions.create(**options, reasoning_effort="low", stop=[">x"]).usage
    assert held == usage, "the end of the thoughts is held back, and no token of the answer is one of theirs"
    both = client.chat.completions.create(**options, reasoning_effort="low", n=2).usage
    assert both is not None
    assert both.completion_tokens_details is not None
    assert both.completion_tokens == 2 * usage.completion_tokens
    assert both.completion_tokens_details.reasoning_tokens == 2 * usage.completion_tokens_details.reasoning_tokens
    assert both.prompt_tokens == usage.prompt_tokens  # read once


def test_n_seed_and_limits(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "noise", "messages": ASK, "max_completion_tokens": 8, "seed": -5, "n": 3}
    answer = client.chat.completions.create(**options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in answer.choices} <= {"length", "stop"}
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    streamed, roles = ["", "", ""], []
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        roles += [chunk.choices[0].index] if chunk.choices[0].delta.role else []
    assert streamed == texts
    assert roles == [0, 1, 2]  # once each, in its first delta
    long = client.chat.completions.create(
        **{**options, "n": 1, "max_completion_tokens": 3}, extra_body={"ignore_eos": True}
    )
    assert long.choices[0].finish_reason == "length"
    assert long.usage is not None
    assert long.usage.completion_tokens == 3
    # The newer name of two wins.
    both = client.chat.completions.create(
        **{**options, "n": 1, "max_completion_tokens": 3, "max_tokens": 5}, extra_body={"ignore_eos": True}
    )
    assert both.usage is not None
    assert both.usage.completion_tokens == 3


def test_stop(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "parrot", "messages": ASK, "temperature": 0}
    for stop in (" sw", [" swims", "鱼 "]):
        answer = client.chat.completions.create(**options, stop=stop)
        assert answer.choices[0].message.content == ("小鱼" if stop == " sw" else "小")
        assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_the_models(client: openai.OpenAI, running: Running) -> None:
    answer = client.chat.completions.create(
        model="noise", messages=ASK, seed=1, max_tokens=6, temperature=0.5, logprobs=True, top_logprobs=3,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.logprobs is not None
    entries = choice.logprobs.content
    assert entries is not None
    engine = running.engines["noise"].engine
    ids = [*answer.prompt_token_ids, *choice.token_ids]
    with torch.no_grad():
        hidden = engine.model(torch.tensor([ids]), torch.arange(len(ids))[None], CausalAttention())
        logprobs = engine.model.logits(hidden)[0].log_softmax(-1)
    start = len(answer.prompt_token_ids) - 1
    shown = [i for i, token in enumerate(choice.token_ids) if engine.tokenizer.byte_strings[token]]
    assert len(entries) == len(shown)
    for entry, place in zip(entries, shown, strict=True):
        row = logprobs[start + place]
        assert entry.logprob == pytest.approx(row[choice.token_ids[place]].item(), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode(errors="replace").lstrip() == (
        choice.message.content
    )


def test_streamed_and_whole_logprobs_are_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "noise", "messages": ASK, "seed": 2, "max_tokens": 12, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0].logprobs
    assert whole is not None
    streamed = []
    for chunk in client.chat.completions.create(**options, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == whole.content


def test_completions(client: openai.OpenAI, running: Running) -> None:
    engine = running.engines["noise"].engine
    ids = [5, 50, 60]
    answer = client.completions.create(
        model="noise", prompt=["the pond", "小鱼"], max_tokens=5, temperature=0, n=2, logprobs=2, extra_body={
            "ignore_eos": True, "return_token_ids": True,
        },
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    assert answer.choices[2].prompt_token_ids == engine.prompt_ids("小鱼")
    assert answer.usage is not None
    read = len(engine.prompt_ids("the pond")) + len(engine.prompt_ids("小鱼"))  # each once, for both of its answers
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, 2 * 2 * 5)
    for prompt, choice in zip(["the pond"] * 2 + ["小鱼"] * 2, answer.choices, strict=True):
        assert len(choice.token_ids) == 5
        assert choice.finish_reason == "length"
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.top_logprobs is not None
        assert logprobs.text_offset is not None
        assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == 5
        assert logprobs.text_offset[0] == len(prompt)  # counted from the prompt's start, as at OpenAI
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            shown = not token.startswith(("bytes:", "<"))
            assert not shown or (prompt + choice.text)[offset:].startswith(token)
    streamed = client.completions.create(
        model="noise", prompt=ids, max_tokens=5, temperature=0, stream=True, stream_options={"include_usage": True},
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    *chunks, last = streamed
    assert last.usage is not None
    assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], 3, 5)
    assert chunks[0].choices[0].prompt_token_ids == ids
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == (
        client.completions.create(
            model="noise", prompt=[ids], max_tokens=5, temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        ).choices[0].token_ids
    )  # fmt: skip
    drawn = client.completions.create(
        model="noise", prompt="x", seed=1, temperature=2, logprobs=1, max_tokens=8, extra_body={"ignore_eos": True}
    ).choices[0].logprobs  # fmt: skip
    assert drawn is not None
    assert drawn.tokens is not None
    assert drawn.token_logprobs is not None
    for token, logprob, likeliest in zip(drawn.tokens, drawn.token_logprobs, drawn.top_logprobs or (), strict=True):
        assert likeliest[token] == logprob, "also where another one was likelier"
        assert len(likeliest) <= 2
    assert any(len(likeliest) == 2 for likeliest in drawn.top_logprobs or ())
    short = client.completions.create(model="noise", prompt="x", extra_body={"ignore_eos": True})
    assert len(short.choices) == 1
    assert short.usage is not None
    assert short.usage.completion_tokens == 16  # OpenAI's default


def test_text_offsets_count_from_the_start_of_a_prompt_of_tokens(client: openai.OpenAI, running: Running) -> None:
    ids = running.engines["noise"].engine.prompt_ids("小鱼 swims")  # a control token, which is no text, and the words
    options: dict[str, Any] = {"model": "noise", "prompt": ids, "max_tokens": 4, "logprobs": 0, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**options).choices[0].logprobs
    assert whole is not None
    assert whole.text_offset is not None
    assert whole.text_offset[0] == len("小鱼 swims")
    streamed: list[int] = []
    for chunk in client.completions.create(**options, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.text_offset or []
    assert streamed == whole.text_offset


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["parrot", "thinker", "noise", "wide"]
    assert client.models.retrieve("noise").max_model_len == 256
    with pytest.raises(openai.NotFoundError, match="does not exist") as raised:
        client.chat.completions.create(model="gpt-5", messages=ASK)
    assert raised.value.code == "model_not_found"


def test_a_hub_id_is_a_name_like_any_other(tmp_path: Path) -> None:
    """`minnow serve ORG/NAME` is called so, and the client asks for /v1/models/ORG%2FNAME."""
    with serving({"org/name": save_random_model(tmp_path / "m")}) as running:
        client = running.client()
        assert client.models.retrieve("org/name").id == "org/name"
        assert client.completions.create(model="org/name", prompt="x", max_tokens=1).model == "org/name"


def test_embeddings_are_mean_hidden_states(client: openai.OpenAI, running: Running) -> None:
    texts = ["the pond", "小鱼 swims"]
    vectors = [item.embedding for item in client.embeddings.create(model="noise", input=texts).data]  # base64 inside
    numbers = client.embeddings.create(model="noise", input=texts, encoding_format="float")
    assert [item.embedding for item in numbers.data] == [pytest.approx(vector, abs=1e-6) for vector in vectors]
    engine = running.engines["noise"].engine
    assert numbers.usage.prompt_tokens == numbers.usage.total_tokens == sum(len(engine.prompt_ids(t)) for t in texts)
    for text, vector in zip(texts, vectors, strict=True):
        ids = engine.prompt_ids(text)
        with torch.no_grad():
            hidden = engine.model(torch.tensor([ids]), torch.arange(len(ids))[None], CausalAttention())[0]
        expected = hidden.mean(0).numpy()
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)
    raw = httpx.post(
        f"{running.url}/v1/embeddings", json={"model": "noise", "input": texts[0], "encoding_format": "base64"}
    ).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw), "<f4"), vectors[0], atol=1e-6)
    assert math.isclose(float(np.linalg.norm(vectors[0])), 1.0, rel_tol=1e-5)


def test_embeddings_are_put_together_without_torch(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop's thread lives on, and OpenMP threads of its own would slow every later step down."""
    monkeypatch.setattr(embeddings, "TOKENS_PER_STEP", 1)
    model = running.app.state.minnow.models.get("noise")
    with NoTorch():
        vectors = asyncio.run(embeddings._embed(model, [[5], [6, 7]]))
        items = [embeddings._item(0, vectors[1], as_base64) for as_base64 in (True, False)]
    assert len(vectors) == 2
    assert np.frombuffer(base64.b64decode(str(items[0]["embedding"])), "<f4").tolist() == items[1]["embedding"]


async def _together(client: openai.AsyncOpenAI) -> list[str]:
    async def one(i: int) -> str:
        text = ""
        stream = await client.chat.completions.create(
            model="noise", messages=ASK, seed=i, max_tokens=20, stream=True, temperature=1.2
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text

    return await asyncio.gather(*(one(i) for i in range(24)))


def test_many_at_once_say_what_each_says_alone(running: Running, client: openai.OpenAI) -> None:
    together = asyncio.run(_together(running.async_client()))
    for i in (0, 7, 23):
        alone = client.chat.completions.create(model="noise", messages=ASK, seed=i, max_tokens=20, temperature=1.2)
        assert alone.choices[0].message.content == together[i]


def test_a_message_of_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="parrot", messages=ASK, temperature=0)
    messages = [*ASK, answer.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "again"}]}]
    assert client.chat.completions.create(model="parrot", messages=messages, temperature=0).choices[0].message.content


def test_rollouts_through_the_server_are_the_engines(running: Running, tmp_path: Path) -> None:
    """Reinforcement learning's client: token ids and a log-probability for each, the end token's too."""
    engine = running.engines["wide"].engine
    remote = RemoteEngine(
        RemoteEngineConfig(url=f"{running.url}/v1", model="wide"), engine.model, engine.tokenizer, tmp_path
    )
    prompts = [[5, 50, 60], [7, 99]]
    end = engine.tokenizer.im_end_id
    params = [SamplingParams(seed=seed, max_tokens=200) for seed in (1, 2)]
    local = Engine(engine.model, engine.tokenizer).generate(
        prompts, [SamplingParams(seed=p.seed, max_tokens=200, logprobs=True) for p in params]
    )
    for there, here in zip(remote.generate(prompts, params), local, strict=True):
        assert there.completions[0].ids == here.completions[0].ids
        assert there.completions[0].logprobs == pytest.approx(here.completions[0].raw_logprobs, abs=1e-4)
        assert there.completions[0].text == here.completions[0].text
    assert any(output.completions[0].ids[-1] in (end, engine.tokenizer.end_of_text_id) for output in local)
