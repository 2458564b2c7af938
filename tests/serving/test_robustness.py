"""Bad requests, full queues, clients that leave, servers that stop."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from minnow.serving import ServingConfig, chat, embeddings
from minnow.serving.prompts import chat_prompt
from minnow.serving.requests import ChatBody
from minnow.tokenizer import Conversation, Message, ToolCall, render

from ..stages.stage_helpers import save_random_model, tiny_tokenizer
from .serving_helpers import Running, serving, wait_until

ASK: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = {"model": "noise", "messages": ASK, "max_tokens": 4}
LONG = {"model": "noise", "messages": ASK, "max_tokens": 4000, "ignore_eos": True}

SWIM = {"type": "function", "function": {"name": "swim"}}
CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "3"}
WRONG_SCHEMA = {"name": "x", "schema": {"type": 5}}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert answer.headers["content-type"] == "application/json"
    return body["error"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 10**40}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [*ASK, {"role": "assistant"}]}, "messages"),
        ({"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": []}]}, "messages"),
        ({"messages": [*ASK, RESULT]}, "messages"),
        ({"messages": [*ASK, CALLED, RESULT, *ASK, RESULT]}, "messages"),
        ({"messages": [*ASK, CALLED, RESULT | {"tool_call_id": "b"}]}, "messages"),
        ({"messages": [*ASK, CALLED, {"role": "tool", "content": "3"}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"fish": 1}}, "logit_bias"),
        ({"logit_bias": {"1_0": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias"),  # an Arabic 3
        ({"logit_bias": {" 3": 1}}, "logit_bias"),
        ({"logit_bias": {"3" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop_token_ids": [5, 99999]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"min_tokens": 1, "response_format": {"type": "json_object"}}, "min_tokens"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
        ({"temprature": 1}, "temprature"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [SWIM], "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tools": [SWIM, SWIM]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "not a name"}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": WRONG_SCHEMA}}, "response_format"),
        ({"model": None}, "model"),
        ({"\ud800": 1}, None),
    ],
)  # fmt: skip
def test_bad_requests_are_400_in_openais_schema(running: Running, changes: dict[str, Any], param: str | None) -> None:
    answer = httpx.post(
        f"{running.url}/v1/chat/completions",
        content=json.dumps(CHAT | changes),
        headers={"Content-Type": "application/json"},
    )
    error = error_of(answer)
    assert answer.status_code == 400, answer.text
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "application/json" not in error["message"]  # it is JSON


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "Invalid value for 'messages.0.content': "),
        ({"messages": [{"role": "user"}]}, "Invalid value for 'messages.0.content': Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages.0.content.0.text': Field req"),
        ({"response_format": {"type": "json_schema"}}, "'response_format.json_schema': Field required"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "'response_format.json_schema.name': Field"),
        ({"tool_choice": {"type": "function"}}, "Invalid value for 'tool_choice.function': Field required"),
        ({"tool_choice": "auto"}, "Invalid value for 'tool_choice': only allowed when tools are given"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "'custom' found using 'type' does not match"),
        ({"tool_choice": "always"}, "Invalid value for 'tool_choice': Input should be 'none', 'auto' or 'required'"),
        (
            {"messages": [*ASK, CALLED, RESULT, RESULT | {"tool_call_id": "b"}]},
            "'messages.3.tool_call_id': the assista",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}]},
            "Invalid value for 'messages.0.function_call': use tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "audio": {"id": "a"}}]},
            "Invalid value for 'messages.0.audio': this server hears nothing",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]},
            "'messages.0.content.0': Input tag 'refusal' found using 'type' does not match any of",
        ),
        ({"messages": [{"role": "assistant"}]}, "'messages.0': an assistant's message needs content or tool_calls"),
        ({"stop": [""]}, "Invalid value for 'stop.0': String should have at least 1 character"),
        ({"tools": [SWIM | {"mcp": 1}]}, "Unrecognized request argument supplied: tools.0.mcp"),
        ({str(i): i for i in range(200)}, "at most 100 are read"),
    ],
)
def test_messages_name_the_field_as_the_client_wrote_it(
    running: Running, changes: dict[str, Any], message: str
) -> None:
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | changes)
    assert answer.status_code == 400
    assert message in error_of(answer)["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}", b"NaN"]
)
@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings"])
def test_what_is_no_request_is_4xx(running: Running, body: bytes, path: str) -> None:
    answer = httpx.post(f"{running.url}/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    message = error_of(answer)["message"]
    assert "pars" in message or message.endswith("Send a JSON object as application/json.")


def test_a_form_and_a_plain_text_are_no_json(running: Running) -> None:
    """Else any web page could send requests from a visitor's browser without asking: CORS lets plain text through, and
    what has no type, which FastAPI before 0.132 took for JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {} if kind is None else {"Content-Type": kind}
        answer = httpx.post(f"{running.url}/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
        assert answer.status_code == 400
        error_of(answer)


def test_numbers_that_json_has_not(running: Running) -> None:
    body = json.dumps(CHAT | {"temperature": float("nan")})
    answer = httpx.post(
        f"{running.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "temperature"


def test_half_a_surrogate_pair_is_no_failure(running: Running) -> None:
    url, headers = f"{running.url}/v1/chat/completions", {"Content-Type": "application/json"}
    unknown = httpx.post(url, content=json.dumps(CHAT | {"model": "\ud800"}), headers=headers)
    assert unknown.status_code == 404
    assert "\ufffd" in error_of(unknown)["message"]
    said = json.dumps(CHAT | {"messages": [{"role": "user", "content": "\ud800"}]})
    assert httpx.post(url, content=said, headers=headers).status_code == 200
    url = f"{running.url}/v1/completions"
    for stream in (False, True):  # a prompt that is repeated is repeated as the model read it
        ask = {"model": "noise", "prompt": "a\ud83db", "max_tokens": 0, "echo": True, "stream": stream}
        echoed = httpx.post(url, content=json.dumps(ask), headers=headers)
        assert echoed.status_code == 200
        assert '"text":"a\ufffdb"' in echoed.text


def test_a_top_k_that_no_tensor_can_hold_costs_nobody_an_answer(running: Running) -> None:
    """It ended the step of the engine, and with it every answer under way."""
    url = f"{running.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=CHAT | {"max_tokens": 200, "ignore_eos": True, "stream": True}) as other:
        for top_k in (2**63, 10**30):
            assert httpx.post(url, json=CHAT | {"top_k": top_k}).status_code == 200
        other.read()
    assert other.text.endswith("data: [DONE]\n\n")


def test_a_temperature_that_only_a_double_can_hold(running: Running) -> None:
    greedy, tiny = (
        httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | {"temperature": temperature}).json()
        for temperature in (0, 5e-324)
    )
    assert tiny["choices"] == greedy["choices"]


def test_unknown_paths_and_methods(running: Running) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        answer = httpx.request(method, running.url + path)
        assert answer.status_code == status
        assert path in error_of(answer)["message"]


def test_a_prompt_too_long_names_both_lengths(client: openai.OpenAI, running: Running) -> None:
    ids = [5] * 300
    with pytest.raises(openai.BadRequestError, match=r"256 tokens.*300 tokens") as raised:
        client.completions.create(model="noise", prompt=ids)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="256 tokens") as raised:
        client.chat.completions.create(model="noise", messages=[{"role": "user", "content": "x" * 10_000}])
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match=r"256 tokens\. However, your text has 300 tokens"):
        client.embeddings.create(model="noise", input=ids)
    assert client.embeddings.create(model="noise", input=[5] * 256).usage.prompt_tokens == 256, "no answer needs room"


def test_a_full_queue_is_429_and_a_large_body_413(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "m", context=4096)
    config = ServingConfig(max_answers=4, max_body_mib=0.01, max_samples=4)
    with serving({"noise": folder}, config) as running:
        url = f"{running.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=LONG | {"stream": True, "n": 4}) as answer:
            assert answer.status_code == 200
            refused = httpx.post(url, json=CHAT)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert error_of(refused)["type"] == "rate_limit_error"
        wait_until(lambda: running.engines["noise"].in_flight == 0)
        assert httpx.post(url, json=CHAT).status_code == 200  # the places are free again
        for kind in ({"content": b"x" * 20_000}, {"content": iter([b"x" * 6000] * 4)}):  # with a length, and chunked
            large = httpx.post(url, headers={"Content-Type": "application/json"}, **kind)
            assert large.status_code == 413
            error_of(large)
        many = httpx.post(f"{running.url}/v1/completions", json={"model": "noise", "prompt": ["x"] * 5})
        assert many.status_code == 400
        assert "5 prompts" in error_of(many)["message"]
        for path, given in (("completions", {"prompt": ["x"] * 2, "n": 3}), ("chat/completions", CHAT | {"n": 5})):
            many = httpx.post(f"{running.url}/v1/{path}", json={"model": "noise", **given})
            assert (many.status_code, error_of(many)["param"]) == (400, "n")


def test_a_refused_prompt_takes_the_others_of_its_request_with_it(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "m", context=4096)
    with serving({"noise": folder}, ServingConfig(max_answers=2)) as running:
        engine = running.engines["noise"]
        body = {"model": "noise", "prompt": ["x"] * 2, "max_tokens": 4000, "ignore_eos": True}
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=LONG | {"stream": True}) as answer:
            assert answer.status_code == 200
            assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 429
            wait_until(lambda: engine.in_flight == 1)
        wait_until(lambda: engine.in_flight == 0 and not engine.engine.has_work)
        never = httpx.post(f"{running.url}/v1/completions", json=body | {"prompt": ["x"] * 3})
        assert never.status_code == 400, "more than ever fit at once need not come again"
        assert "this server gives 2" in error_of(never)["message"]


def test_prompts_of_one_request_begin_together(tmp_path: Path) -> None:
    """Each waited for a step of the engine that the one before it had begun with."""
    with serving({"noise": save_random_model(tmp_path / "m")}) as running, ThreadPoolExecutor() as pool:
        engine, gate = running.engines["noise"], threading.Event()
        engine._commands.put(lambda: gate.wait(30) and None)
        body = {"model": "noise", "prompt": [[i] for i in range(5, 13)], "max_tokens": 2, "logprobs": 0}
        asked = pool.submit(httpx.post, f"{running.url}/v1/completions", json=body, timeout=60)
        try:
            wait_until(lambda: engine._commands.qsize() == 8, 10)
        finally:
            gate.set()
        assert [choice["index"] for choice in asked.result().json()["choices"]] == list(range(8))


def test_no_answer_is_longer_than_the_server_gives(tmp_path: Path) -> None:
    with serving({"noise": save_random_model(tmp_path / "m")}, ServingConfig(max_answer_tokens=3)) as running:
        for path, given in (("chat/completions", {"messages": ASK}), ("completions", {"prompt": "x"})):
            for limit in ({}, {"max_tokens": 9}, {"max_tokens": 2}):
                body = {"model": "noise", "ignore_eos": True, **given, **limit}
                answer = httpx.post(f"{running.url}/v1/{path}", json=body).json()
                assert answer["usage"]["completion_tokens"] == min(3, limit.get("max_tokens", 3))
                assert answer["choices"][0]["finish_reason"] == "length"


def test_a_server_that_stops_says_when_to_come_again(tmp_path: Path) -> None:
    with serving({"noise": save_random_model(tmp_path / "m")}) as running:
        asyncio.run(running.engines["noise"].drain(0))
        for path, body in (("chat/completions", CHAT), ("embeddings", {"model": "noise", "input": "x"})):
            answer = httpx.post(f"{running.url}/v1/{path}", json=body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
            assert error_of(answer)["code"] == "shutting_down"


def test_embeddings_take_places_and_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an answer three clients find a place and a fourth none; between two steps one group of texts is read."""
    monkeypatch.setattr(embeddings, "TOKENS_PER_STEP", 1)
    events: list[str] = []
    mean_hidden = embeddings.mean_hidden
    monkeypatch.setattr(embeddings, "mean_hidden", lambda *a: events.append("group") or mean_hidden(*a))
    with serving({"noise": save_random_model(tmp_path / "m")}, ServingConfig(max_answers=4)) as running:
        engine, gate = running.engines["noise"], threading.Event()
        step = engine.engine.step
        monkeypatch.setattr(engine.engine, "step", lambda: events.append("step") or step())
        engine._commands.put(lambda: gate.wait(30) and None)

        def post(path: str, **body: Any) -> Callable[[], httpx.Response]:
            url = f"{running.url}/v1/{path}"
            return lambda: httpx.post(url, json={"model": "noise", **body}, timeout=60)

        embed = post("embeddings", input=["a fish", "a pond"])
        ask = post("completions", prompt="x", max_tokens=20, ignore_eos=True)
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(asking) for asking in (ask, embed, embed, embed)]
            wait_until(lambda: engine._commands.qsize() == 4)
            refused = embed()
            gate.set()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert error_of(refused)["code"] == "queue_full"
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert engine.in_flight == 0
        assert embed().status_code == 200
    assert events.count("group") == 8
    assert all("step" in pair for pair in pairwise(events))


def test_no_memory_for_embeddings_is_a_503(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an answer: it was a 500, which clients do not try again for less."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(embeddings, "mean_hidden", fail)
    answer = httpx.post(f"{running.url}/v1/embeddings", json={"model": "noise", "input": "x"})
    assert answer.status_code == 503
    assert "out of memory" in error_of(answer)["message"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "given", "answers"),
    [("chat/completions", {"messages": ASK}, 1), ("completions", {"prompt": ["x", "y"]}, 2)],
)
def test_a_client_that_leaves_frees_its_place(
    tmp_path: Path, stream: bool, path: str, given: dict[str, Any], answers: int
) -> None:
    folder = save_random_model(tmp_path / "m", context=20_000)
    with serving({"noise": folder}) as running:
        engine = running.engines["noise"]
        options = {"model": "noise", "max_tokens": 19_000, "ignore_eos": True, "stream": stream}
        body = json.dumps(options | given).encode()
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
            head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: engine.in_flight == answers)
            if stream:
                assert b"200 OK" in connection.recv(1000)
        wait_until(lambda: engine.in_flight == 0)
        wait_until(lambda: not engine.engine.has_work)
        aborted = f'minnow_aborted_requests_total{{model="noise"}} {answers}.0'
        assert aborted in httpx.get(f"{running.url}/metrics").text


def test_the_loop_answers_while_others_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenising and generation are in other threads: /health is answered while they stand still."""

    def held(method: Callable[..., Any], began: threading.Event, go_on: threading.Event) -> Callable[..., Any]:
        def hold(*arguments: Any) -> Any:
            began.set()
            assert go_on.wait(120)
            return method(*arguments)

        return hold

    with serving({"noise": save_random_model(tmp_path / "m")}) as running, httpx.Client() as client:
        engine = running.engines["noise"].engine
        body = CHAT | {"max_tokens": 1}
        for target, name in ((chat, "chat_prompt"), (engine, "step")):
            began, go_on = threading.Event(), threading.Event()
            with monkeypatch.context() as patch, ThreadPoolExecutor() as pool:
                patch.setattr(target, name, held(getattr(target, name), began, go_on))
                asked = pool.submit(httpx.post, f"{running.url}/v1/chat/completions", json=body, timeout=240)
                try:
                    assert began.wait(60), name
                    for _ in range(5):
                        assert client.get(f"{running.url}/health", timeout=60).status_code == 200
                finally:
                    go_on.set()
                assert asked.result().status_code == 200


def test_a_broken_engine_is_a_500_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"noise": save_random_model(tmp_path / "m")}) as running:
        engine = running.engines["noise"].engine
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: 1 // 0)
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT)
        assert answer.status_code == 500
        assert "division" not in error_of(answer)["message"]
        streamed = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | {"stream": True})
        last = streamed.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        text = httpx.get(f"{running.url}/metrics").text
        assert 'minnow_requests_total{path="/v1/chat/completions",status="500"} 1.0' in text
        assert "minnow_aborted_requests_total{" not in text  # no client has left
        monkeypatch.setattr(engine, "step", step)
        assert httpx.post(f"{running.url}/v1/chat/completions", json=CHAT).status_code == 200
        with torch.no_grad():
            engine.model.model.norm.weight.fill_(torch.nan)
        engine.weights_updated()
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT)
        assert (answer.status_code, error_of(answer)["type"]) == (500, "server_error")


def test_metrics_count(tmp_path: Path) -> None:
    with serving({"noise": save_random_model(tmp_path / "m")}) as running:
        body = CHAT | {"max_tokens": 5, "ignore_eos": True}
        usage = httpx.post(f"{running.url}/v1/chat/completions", json=body).json()["usage"]
        assert 'minnow_cached_prompt_tokens_total{model="noise"} 0.0' in httpx.get(f"{running.url}/metrics").text
        again = httpx.post(f"{running.url}/v1/chat/completions", json=body).json()["usage"]
        cached = again["prompt_tokens_details"]["cached_tokens"]
        assert 0 < cached < usage["prompt_tokens"]
        httpx.get(f"{running.url}/v1/unknown")
        text = httpx.get(f"{running.url}/metrics").text
        assert 'minnow_generated_tokens_total{model="noise"} 10.0' in text
        assert f'minnow_prompt_tokens_total{{model="noise"}} {2 * usage["prompt_tokens"]}.0' in text
        assert f'minnow_cached_prompt_tokens_total{{model="noise"}} {cached}.0' in text
        assert 'minnow_aborted_requests_total{model="noise"}' not in text
        assert 'minnow_requests_total{path="/v1/chat/completions",status="200"} 2.0' in text
        assert 'minnow_requests_total{path="other",status="404"} 1.0' in text
        for name, status in (("noise", 200), ("whale", 404)):
            assert httpx.get(f"{running.url}/v1/models/{name}").status_code == status
            line = f'minnow_requests_total{{path="/v1/models/{{name}}",status="{status}"}} 1.0'
            assert line in httpx.get(f"{running.url}/metrics").text
        assert 'minnow_answers_in_flight{model="noise"} 0.0' in text
        for figure in ("time_to_first_token", "request"):
            assert f'minnow_{figure}_seconds_count{{model="noise"}} 2.0' in text


def test_metrics_count_the_prompts_of_answers_that_were_left(tmp_path: Path) -> None:
    """Their tokens were read, and counted only where an answer came to its end."""
    with serving({"noise": save_random_model(tmp_path / "m", context=20_000)}) as running:
        engine, prompt = running.engines["noise"], list(range(40))
        body = {"model": "noise", "prompt": prompt, "max_tokens": 19_000, "ignore_eos": True, "stream": True}
        for number in (1, 2):
            with httpx.stream("POST", f"{running.url}/v1/completions", json=body | {"logprobs": 0}) as answer:
                next(answer.iter_lines())
            wait_until(lambda: engine.in_flight == 0)
            text = httpx.get(f"{running.url}/metrics").text
            assert f'minnow_aborted_requests_total{{model="noise"}} {number}.0' in text
            assert f'minnow_prompt_tokens_total{{model="noise"}} {40 * number}.0' in text
            assert f'minnow_cached_prompt_tokens_total{{model="noise"}} {32 * (number - 1)}.0' in text
            assert f'minnow_time_to_first_token_seconds_count{{model="noise"}} {number}.0' in text


def test_an_asynchronous_client_that_is_cancelled(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "m", context=20_000)
    with serving({"noise": folder}) as running:

        async def leave() -> None:
            client = running.async_client()
            extra = {"ignore_eos": True}
            asking = client.chat.completions.create(model="noise", messages=ASK, max_tokens=19_000, extra_body=extra)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asking, 0.3)

        asyncio.run(leave())
        wait_until(lambda: running.engines["noise"].in_flight == 0)


def test_messages_that_openai_takes(running: Running) -> None:
    refused = {"role": "assistant", "content": None, "refusal": "no"}
    for messages in ([*ASK, CALLED, RESULT, RESULT], [*ASK, refused, *ASK], [{"role": "assistant", "content": ""}]):
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | {"messages": messages})
        assert answer.status_code == 200, answer.text


def test_all_that_was_said_is_in_the_prompt() -> None:
    """Every field of a message that says something, against the conversation written by hand."""
    function = {"name": "f", "parameters": {"type": "object"}}
    body = ChatBody.model_validate({
        "model": "m",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "deep?"}]},
            {"role": "assistant", "content": None, "refusal": "no"},
            {"role": "user", "content": "please"},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "still "}, {"type": "refusal", "refusal": "no"}],
            },
            {"role": "user", "content": "pretty please"},
            {"role": "assistant", "content": "wait", "reasoning_content": "hm", "tool_calls": CALLED["tool_calls"]},
            RESULT,
        ],
        "tools": [{"type": "function", "function": function | {"strict": True}}],
    })  # fmt: skip
    said = (
        Message("system", "be brief"),
        Message("user", "how deep?"),
        Message("assistant", "no"),
        Message("user", "please"),
        Message("assistant", "still no"),
        Message("user", "pretty please"),
        Message("assistant", "wait", "hm", (ToolCall("f", {}),)),
        Message("tool", "3"),
    )
    tokenizer = tiny_tokenizer()
    conversation = Conversation(said, ({"type": "function", "function": function},))  # strict is for the server
    expected = render(tokenizer, conversation, add_generation_prompt=True).ids.tolist()
    assert chat_prompt(tokenizer, body).ids.tolist() == expected


@pytest.mark.parametrize("given", ["", [""], ["a", ""], [], [[]]])
def test_there_must_be_something_to_embed(running: Running, given: Any) -> None:
    answer = httpx.post(f"{running.url}/v1/embeddings", json={"model": "noise", "input": given})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "input"
    assert "should have at least 1" in error_of(answer)["message"]


def test_tokens_beyond_the_vocabulary(running: Running) -> None:
    for path, field in (("completions", "prompt"), ("embeddings", "input")):
        answer = httpx.post(f"{running.url}/v1/{path}", json={"model": "noise", field: [[5], [320]]})
        assert answer.status_code == 400
        assert "320 is not in the vocabulary, 0 to 319" in error_of(answer)["message"]
