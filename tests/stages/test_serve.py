"""`minnow serve` as a process: it listens, answers, drains on SIGTERM, and refuses what is not safe."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import torch
import uvicorn

from minnow.config import UserError
from minnow.engine import Engine, SamplingParams, parts
from minnow.model.context import ContextConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.stages import serve
from minnow.stages.serve import Config, build_app, name_models, place_adapters, run
from minnow.tokenizer import Tokenizer

from ..serving.serving_helpers import running_app
from .stage_helpers import save_lively_model, save_parrot_model, save_random_adapter, save_random_model


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


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_refused_in_words(port: int) -> None:
    with pytest.raises(UserError, match=f"--port {port}: ports are 0 to 65535"):
        serve._listen("127.0.0.1", port)


@pytest.mark.parametrize(("memory_share", "together"), [(None, 0.25), (0.1, 0.1)])
def test_models_share_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_share: float | None, together: float
) -> None:
    monkeypatch.setattr(parts, "host_memory", lambda: 2**40)
    folder = save_random_model(tmp_path / "m")
    named = name_models([f"{name}={folder}" for name in "abcd"])
    config = Config(models=tuple(named), memory_share=memory_share, device="cpu", precision="fp32")
    engines = [model.engine for model in build_app(config, named, {}, local=True).state.minnow.models]
    assert [engine.engine._memory() for engine in engines] == [int(2**40 * together / 4)] * 4
    for engine in engines:
        engine.close()


def test_compile_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one row and of several are compiled apart, and what stands between the products for prompts: all of it
    before the server listens, for any number of rows and tokens."""
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        made.append(graph)
        return graph

    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_function(f, **options | {"backend": backend}))
    torch._dynamo.reset()
    folder = save_random_model(tmp_path / "m")
    config = Config(models=(str(folder),), device="cpu", precision="fp32", compile=True)
    (model,) = build_app(config, name_models([str(folder)]), {}, local=True).state.minnow.models
    norms, rotations, activations = 2, 2, 1  # of hidden states and heads; of queries and keys
    assert len(made) == 2 + norms + rotations + activations
    made.clear()
    model.engine.close()
    for rows in (1, 2, 3, 7):
        for prompt in ([5], [5, 6], [5, 6, 7], list(range(5, 13))):
            model.engine.engine.generate([prompt] * rows, SamplingParams(max_tokens=4, ignore_eos=True))
    assert not made


def test_a_mixture_is_not_compiled_and_that_is_said(tmp_path: Path) -> None:
    """--compile had no effect on it, without a word."""
    folder = save_random_model(tmp_path / "mixture")
    shape = load_pretrained(folder).config
    experts = ExpertsConfig(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    save_pretrained(CausalLM(replace(shape, experts=experts)), folder, Tokenizer.from_pretrained(folder))
    with pytest.raises(UserError, match="--compile: mixture is a mixture of experts"):
        run(Config(models=(str(folder),), port=0, device="cpu", compile=True))


def test_models_are_loaded_in_a_thread_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling computes: done in the main thread it made every later step two to three times as long."""
    loading = []

    def build(*arguments: object, **options: object) -> None:
        loading.append(threading.current_thread())
        raise UserError("far enough")

    monkeypatch.setattr(serve, "build_app", build)
    with pytest.raises(UserError, match="far enough"):
        run(Config(models=(str(save_random_model(tmp_path / "m")),), port=0))
    assert loading[0] is not threading.main_thread()
    assert not loading[0].is_alive()


def test_a_connection_sends_at_once(tmp_path: Path) -> None:
    """asyncio switches Nagle's algorithm off for sockets that say they are TCP; the others wait 40 ms now and then."""
    accepted = []

    async def connect() -> None:
        listening = serve._listen("127.0.0.1", 0)
        server = await asyncio.start_server(lambda _, writer: accepted.append(writer), sock=listening)
        _, client = await asyncio.open_connection(*listening.getsockname())
        while not accepted:
            await asyncio.sleep(0.01)
        connection = accepted[0].get_extra_info("socket")
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        client.close()
        accepted[0].close()
        server.close()

    asyncio.run(connect())


def test_an_idle_connection_outlives_the_client_s_wish_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When both give it up after the same time, a request just then meets a connection being closed."""
    configs: list[uvicorn.Config] = []

    async def stop(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        configs.append(server.config)

    monkeypatch.setattr(uvicorn.Server, "serve", stop)
    run(Config(models=(str(save_random_model(tmp_path / "m")),), port=0, device="cpu"))
    expiry = openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry
    assert expiry is not None
    assert configs[0].timeout_keep_alive > expiry


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
    swept = save_random_model(tmp_path / "runs/lr=0.1/model")
    assert name_models([str(tmp_path / "runs/lr=0.1"), f"y={swept}"]) == {"lr=0.1": swept, "y": swept}
    with pytest.raises(UserError, match="two models are called a"):
        name_models([str(folder), str(folder.parent)])
    with pytest.raises(UserError, match="needs a name"):
        name_models([f"={folder}"])
    with pytest.raises(UserError, match="no such folder"):
        name_models([str(tmp_path / "b")])


def save_stretched(folder: Path, plain: Path) -> Path:
    """The model in `plain` with its context stretched by YaRN to four times the length."""
    model = load_pretrained(plain)
    model.config = ContextConfig(rope_scaling="yarn", factor=4).extend(model.config)
    save_pretrained(model, folder, Tokenizer.from_pretrained(plain))
    return folder


def test_a_stretched_context(tmp_path: Path) -> None:
    """Of all models: what they say beyond the trained length is what the same models stretched in their files say."""
    folders = {name: save_lively_model(tmp_path / name, seed, context=16) for seed, name in enumerate("ab")}
    adapter = save_random_adapter(tmp_path / "adapter", folders["b"], seed=2)
    config = Config(
        models=tuple(map(str, folders.values())),
        adapters=(f"legal={adapter}",),
        rope_scaling="yarn",
        factor=4,
        device="cpu",
        precision="fp32",
        api_key="k",
    )
    named = name_models(config.models)
    placed = place_adapters(config.adapters, named)
    key = {"Authorization": "Bearer k"}
    ids = [5, 9, 33, 7] * 6
    with running_app(build_app(config, named, placed, local=True)) as server:
        cards = httpx.get(f"{server.url}/v1/models", headers=key).json()["data"]
        assert {card["id"]: card["max_model_len"] for card in cards} == {"a": 64, "b": 64, "legal": 64}
        body = {"prompt": ids, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        for name, folder in folders.items():
            asked = httpx.post(f"{server.url}/v1/completions", json=body | {"model": name}, headers=key).json()
            stretched = Engine.from_pretrained(save_stretched(tmp_path / "stretched" / name, folder))
            (expected,) = stretched.generate([ids], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
            assert asked["choices"][0]["token_ids"] == expected.completions[0].ids
        # The weights of a folder that says the trained length are still this model's.
        assert httpx.post(f"{server.url}/admin/reload", json={"model": "a"}, headers=key).status_code == 200
        assert httpx.get(f"{server.url}/v1/models/a", headers=key).json()["max_model_len"] == 64


def test_a_model_that_is_stretched_already_is_named(tmp_path: Path) -> None:
    plain = save_random_model(tmp_path / "plain", context=16)
    stretched = save_stretched(tmp_path / "stretched", plain)
    with pytest.raises(UserError, match="stretched: the model has rope_scaling yarn by 4 already"):
        run(Config(models=(str(plain), str(stretched)), rope_scaling="linear"))
    with pytest.raises(UserError, match="--factor 4 needs --rope-scaling"):
        run(Config(models=(str(plain),), factor=4))
