"""`--quantize int8` of the commands that answer: what they load, and what they say that it saves and costs."""

from __future__ import annotations

import json
import math
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from minnow.cli import main
from minnow.engine import Engine
from minnow.evaluation.quantization import quantization_note
from minnow.model.int8 import from_int8
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.quantize import is_quantized, load_quantized
from minnow.model.transformer import CausalLM
from minnow.stages.serve import Config, build_app, name_models, place_adapters
from minnow.tokenizer import Tokenizer

from ..serving.serving_helpers import running_app
from .stage_helpers import save_lively_model, save_random_adapter

COST = re.compile(r"int8: weights (\S+) MB against (\S+) MB; ([+-]\d\.\d{4}) bits per byte")


def cost(folder: Path, model: CausalLM) -> float:
    found = COST.search(quantization_note(folder, Engine(model, Tokenizer.from_pretrained(folder))))
    assert found
    return float(found[3])


def save_on_grid(out: Path, folder: Path) -> Path:
    """The model in `folder` with the weights that int8 rounds it to, in float32."""
    exact = load_pretrained(folder)
    rounded = load_quantized(folder, "int8")
    for name, parameter in rounded.named_parameters():
        if parameter.dtype == torch.int8:
            exact.get_parameter(name).data = from_int8(parameter, rounded.get_parameter(f"{name}_scale"))
    save_pretrained(exact, out, Tokenizer.from_pretrained(folder))
    return out


def test_the_cost_is_the_divergence_of_the_two_models(tmp_path: Path) -> None:
    """Nothing where the weights are on int8's grid already; else what the weights' error costs, and more of it more."""
    folder = save_lively_model(tmp_path / "m")
    rounded = load_quantized(folder, "int8")
    little = cost(folder, rounded)
    assert 0 < little < 0.05
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dtype == torch.int8:
                parameter.bitwise_and_(-16)  # only the upper four bits
    assert cost(folder, rounded) > 10 * little
    grid = save_on_grid(tmp_path / "grid", folder)
    assert abs(cost(grid, load_quantized(grid, "int8"))) < 1e-4


def test_the_cost_is_in_bits_per_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes a nat more for a byte takes 1 / ln 2 bits more, however long its tokens are."""
    folder = save_lively_model(tmp_path / "m")
    rounded = load_quantized(folder, "int8")
    tokenizer = Tokenizer.from_pretrained(folder)

    def nats(model: CausalLM, texts: list[list[int]], *_: int) -> list[float]:
        each = 2.0 if model is rounded else 1.0
        return [each * len(tokenizer.decode(text).encode()) for text in texts]

    monkeypatch.setattr("minnow.evaluation.quantization.document_nats", nats)
    assert cost(folder, rounded) == pytest.approx(1 / math.log(2), rel=0.05)


@pytest.mark.parametrize("adapter", [False, True])
def test_generate_and_eval_say_what_it_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: bool) -> None:
    folder = save_lively_model(tmp_path / "m")
    if adapter:
        folder = save_random_adapter(tmp_path / "a", folder, seed=1)
    words = ["--device", "cpu", "--quantize", "int8"]
    assert main(["generate", str(folder), "--prompt", "a", "--max-tokens", "4", "--precision", "fp32", *words]) == 0
    assert COST.search(capsys.readouterr().err)
    (tmp_path / "t.txt").write_text("the little minnow swims")
    figures = []
    for quantize in ("none", "int8"):
        out = tmp_path / f"{quantize}.json"
        command = ["eval", str(folder), "--tasks", "bpb", "--text", str(tmp_path / "t.txt"), "--device", "cpu"]
        assert main([*command, "--quantize", quantize, "--json", str(out)]) == 0
        said = "int8: weights" in capsys.readouterr().err
        assert said == (quantize == "int8")
        figures.append(json.loads(out.read_text())["tasks"]["bpb"]["figures"]["bits_per_byte/t.txt"]["value"])
    assert figures[0] != figures[1]
    assert math.isclose(figures[0], figures[1], rel_tol=0.02)


def test_a_served_int8_model_stays_one_when_it_is_reloaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding computes: it happens in a thread that ends, or the engine's would be slower ever after."""
    rounding: list[threading.Thread] = []

    def load(*arguments: Any, **options: Any) -> CausalLM:
        rounding.append(threading.current_thread())
        return load_quantized(*arguments, **options)

    monkeypatch.setattr("minnow.serving.models.load_quantized", load)
    folder, other = save_lively_model(tmp_path / "m"), save_lively_model(tmp_path / "other", seed=5)
    named = name_models([str(folder)])
    config = Config(models=(str(folder),), device="cpu", precision="fp32", quantize="int8", api_key="k")
    app = build_app(config, named, {}, local=True)
    assert capsys.readouterr().err.startswith("m: int8: weights")
    (served,) = app.state.minnow.models
    with running_app(app) as running:

        def answer() -> str:
            body = {"model": "m", "prompt": "pond", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            headers = {"Authorization": "Bearer k"}
            text = httpx.post(f"{running.url}/v1/completions", json=body, headers=headers).json()
            return str(text["choices"][0]["text"])

        before = answer()
        reloaded = httpx.post(
            f"{running.url}/admin/reload",
            json={"model": "m", "folder": str(other)},
            headers={"Authorization": "Bearer k"},
        )
        assert reloaded.status_code == 200, reloaded.text
        assert not rounding[0].is_alive()
        assert is_quantized(served.engine.engine.model)
        assert answer() != before
        expected = load_quantized(other, "int8").state_dict()
        for name, tensor in served.engine.engine.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_adapters_are_served_on_an_int8_model(tmp_path: Path) -> None:
    """Each answers as on a float32 model of the same rounded weights: the adapters themselves are not rounded."""
    folder = save_lively_model(tmp_path / "m")
    grid = save_on_grid(tmp_path / "grid", folder)
    answers = {}
    for quantize, base in (("int8", folder), ("none", grid)):
        adapter = save_random_adapter(tmp_path / f"adapter-{quantize}", base, seed=3)
        named = name_models([f"m={base}"])
        placed = place_adapters([f"a={adapter}"], named)
        config = Config(models=(f"m={base}",), device="cpu", precision="fp32", quantize=quantize)
        with running_app(build_app(config, named, placed, local=True)) as running:
            answers[quantize] = [
                httpx.post(
                    f"{running.url}/v1/completions",
                    json={"model": name, "prompt": "pond", "max_tokens": 12, "temperature": 0, "ignore_eos": True},
                ).json()["choices"][0]["text"]
                for name in ("m", "a")
            ]
    assert answers["int8"] == answers["none"]
    assert answers["int8"][0] != answers["int8"][1]
