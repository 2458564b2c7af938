"""`minnow serve` as a process: it listens, answers, drains on SIGTERM, and refuses what is not safe."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from minnow.config import UserError
from minnow.engine import engine as engine_module
from minnow.stages.serve import Config, build_app, name_models, run

from .stage_helpers import save_parrot_model, save_random_model


@contextmanager
def process(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and the address it printed."""
    command = [sys.executable, "-m", "minnow", "serve", *words, "--port", "0", "--device", "cpu", "--precision", "fp32"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.fullmatch(r"serving (.*) at (http://\S+)/v1\n", line)
        assert found, line
        yield server, found[2]
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(("memory_share", "together"), [(None, 0.25), (0.1, 0.1)])
def test_models_share_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_share: float | None, together: float
) -> None:
    monkeypatch.setattr(engine_module, "host_memory", lambda: 2**40)
    folder = save_random_model(tmp_path / "m")
    named = name_models([f"{name}={folder}" for name in "abcd"])
    config = Config(models=tuple(named), memory_share=memory_share, device="cpu", precision="fp32")
    engines = [model.engine for model in build_app(config, named, {}, local=True).state.minnow.models]
    assert [engine.engine._memory(torch.device("cpu")) for engine in engines] == [int(2**40 * together / 4)] * 4
    for engine in engines:
        engine.close()


def test_it_serves_and_drains(tmp_path: Path) -> None:
    """SIGTERM: no new connection, but the stream under way comes to its end."""
    save_parrot_model(tmp_path / "runs/chatty/model", "小鱼 swims§<|im_end|>§")
    save_random_model(tmp_path / "noise", context=2000)
    with process(str(tmp_path / "runs/chatty"), f"other={tmp_path / 'noise'}") as (server, url):
        names = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        assert names == ["chatty", "other"]
        body = {"model": "chatty", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == "小鱼 swims"
        tokens = 300
        body = {"model": "other", "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"return_token_ids": True}) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in [first, *rest[:-1]]]
        assert sum(len(event["choices"][0]["token_ids"]) for event in events) == tokens
        assert server.wait(timeout=20) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_the_key_may_come_from_the_environment(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "m")
    with process(str(folder), MINNOW_API_KEY="k") as (_, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200


def test_beyond_this_machine_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINNOW_API_KEY", raising=False)
    folder = save_random_model(tmp_path / "m")
    with pytest.raises(UserError, match="MINNOW_API_KEY"):
        run(Config(models=(str(folder),), host="0.0.0.0"))
    assert Config(models=("x",)).host == "127.0.0.1"


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port"):
            run(Config(models=(str(save_random_model(tmp_path / "m")),), port=taken.getsockname()[1]))


def test_names(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "runs/a/model")
    assert name_models([str(folder)]) == {"a": folder}
    assert name_models([str(tmp_path / "runs/a")]) == {"a": folder}
    assert name_models([f"x={folder}"]) == {"x": folder}
    with pytest.raises(UserError, match="two models are called a"):
        name_models([str(folder), str(folder.parent)])
    with pytest.raises(UserError, match="needs a name"):
        name_models([f"={folder}"])
    with pytest.raises(UserError, match="no such folder"):
        name_models([str(tmp_path / "b")])
