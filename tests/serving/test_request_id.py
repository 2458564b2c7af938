"""Every answer bears an id, and so does what the server logs about its request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minnow.serving import ServingConfig

from ..stages.stage_helpers import save_random_model
from .serving_helpers import Running, serving

ASK: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = {"model": "noise", "messages": ASK, "max_tokens": 2}


def test_openais_client_shows_it(client: openai.OpenAI) -> None:
    answers = [client.chat.completions.create(model="parrot", messages=ASK, max_tokens=1) for _ in range(2)]
    first, second = (answer._request_id or "" for answer in answers)
    assert first.startswith("req_")
    assert second.startswith("req_")
    assert first != second
    assert client.models.list()._request_id
    with client.chat.completions.with_streaming_response.create(model="parrot", messages=ASK, stream=True) as stream:
        assert (stream.request_id or "").startswith("req_")
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="whale", messages=ASK)
    assert (raised.value.request_id or "").startswith("req_")


def test_every_error_bears_one(tmp_path: Path) -> None:
    config = ServingConfig(api_key="k", max_body_mib=0.01)
    key = {"Authorization": "Bearer k"}
    with serving({"noise": save_random_model(tmp_path / "m")}, config) as running:
        for method, path, more, status in (
            ("GET", "/v1/models", {}, 401),
            ("GET", "/nothing", {"headers": key}, 404),
            ("PUT", "/v1/models", {"headers": key}, 405),
            ("POST", "/v1/embeddings", {"headers": key, "content": b"{"}, 400),
            ("POST", "/v1/embeddings", {"headers": key, "content": b"x" * 20_000}, 413),
            ("GET", "/health", {}, 200),
            ("GET", "/", {"headers": key}, 200),
        ):
            answer = httpx.request(method, running.url + path, **more)
            assert answer.status_code == status
            assert len(answer.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_may_name_its_request(running: Running, stream: bool) -> None:
    ask = f"{running.url}/v1/chat/completions"
    for name in ("a1", "550e8400-e29b-41d4-a716-446655440000", "team/job:7_x.y=+@", "x" * 128):
        answer = httpx.post(ask, json=CHAT | {"stream": stream}, headers={"X-Request-Id": name})
        assert answer.headers.get_list("x-request-id") == [name]
    for name in ("", "x" * 129, "two words", 'a"b', "<b>", "a\tb", "%0a", "鱼".encode(), "$(id)"):
        answer = httpx.post(ask, json=CHAT | {"stream": stream}, headers={"X-Request-Id": name})
        (own,) = answer.headers.get_list("x-request-id")
        assert own.startswith("req_")


@pytest.mark.parametrize("stream", [False, True])
def test_log_lines_name_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    def fail(error: Exception) -> Any:
        raise error

    with serving({"noise": save_random_model(tmp_path / "m")}) as running:
        for error, line in ((ValueError(), "request mine-7 failed"), (MemoryError(), "request mine-7 found no memory")):
            monkeypatch.setattr(running.engines["noise"].engine, "step", lambda error=error: fail(error))
            headers = {"X-Request-Id": "mine-7"}
            httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | {"stream": stream}, headers=headers)
            assert any(record.getMessage().startswith(line) for record in caplog.records)
