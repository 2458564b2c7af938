from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minnow.config import UserError
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.stages import bench_train
from minnow.training.objective import LanguageModeling
from minnow.training.probe import random_batch
from minnow.training.session import Machine

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)


def test_contestants_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides must see the same loss on the same weights: otherwise the ratio compares different jobs."""
    from transformers import AutoModelForCausalLM

    batch = random_batch(97, 2, 32)
    ours = CausalLM(TINY, seed=3)
    with torch.no_grad():  # zero-initialised projections would hide a difference
        for parameter in ours.parameters():
            parameter.normal_(0, 0.05)
    built = []
    original = AutoModelForCausalLM.from_config

    def remember(*arguments: object, **settings: object) -> torch.nn.Module:
        built.append(original(*arguments, **settings))
        return built[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", remember)
    step = bench_train.transformers_step(TINY, batch, torch.device("cpu"), bf16=False, compiled=False)
    theirs = built[0]
    theirs.load_state_dict(ours.state_dict(), strict=False)
    with torch.no_grad():
        expected = theirs(
            input_ids=batch.tokens_BT, labels=batch.targets_BT, shift_labels=batch.targets_BT, use_cache=False
        ).loss
        got = LanguageModeling()(ours, batch).loss_sum / batch.targets_BT.numel()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    before = theirs.model.embed_tokens.weight.detach().clone()
    step()
    assert not torch.equal(before, theirs.model.embed_tokens.weight), "a step must update the weights"


def test_minnow_step_updates_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []
    monkeypatch.setattr(Machine, "place", lambda self, model, *rest: placed.append(model) or model)
    step = bench_train.minnow_step(TINY, random_batch(97, 2, 32), Machine(torch.device("cpu"), torch.float32))
    before = placed[0].head_weight.detach().clone()
    step()
    assert not torch.equal(before, placed[0].head_weight)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_whatever_minnow_computes_in_its_rival_is_compiled_too(
    bf16: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whole, as transformers' Trainer compiles it: head and loss are a good part of a small model."""
    ours, autocast = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: ours.append(type(model).__name__))
    monkeypatch.setattr(bench_train, "time_in_turns", lambda steps, *rest: {name: [1.0] for name in steps})
    monkeypatch.setattr(bench_train, "has_cpp_compiler", lambda: True)
    enabled = torch.autocast.__init__

    def note(self: torch.autocast, *arguments: object, **settings: object) -> None:
        autocast.append(settings.get("enabled"))
        enabled(self, *arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autocast, "__init__", note)
    name = "transformers_" + ("bf16" if bf16 else "fp32") + ("_compiled" if compiled else "")
    bench_train.run(bench_train.Config(model=TINY, rows=1, sequence_length=8, only=(name,), device="cpu"))
    assert ours == ["Qwen3ForCausalLM"] * compiled
    assert (True in autocast) is bf16


def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    bench_train.run(
        bench_train.Config(
            model=TINY,
            rows=2,
            sequence_length=32,
            rounds=2,
            only=("transformers_fp32",),
            device="cpu",
            json=str(out),
        )
    )
    assert json.loads(out.read_text())["transformers_fp32"] > 0


def test_figures_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # A layer: q, o 2 x 32x32 + k, v 2 x 32x16 + MLP 3 x 32x48 = 7680 weights; the head 97 x 32 = 3104.
    # A token's forward pass: 2 x (2 x 7680 + 3104) + 2 layers x 4 x 32 x 16.5 keys on average = 41152; all x 3.
    flops = 3 * 41152
    times = {"minnow": [0.25, 0.5, 1.0], "transformers_fp32": [4.0, 2.0, 1.0]}
    monkeypatch.setattr(bench_train, "time_in_turns", lambda steps, *rest: {name: times[name] for name in steps})
    monkeypatch.setattr(bench_train, "minnow_step", lambda *settings: lambda: None)
    monkeypatch.setattr(bench_train, "transformers_step", lambda *settings, **more: lambda: None)
    monkeypatch.setattr(bench_train, "muon_seconds", lambda *settings: 0.1)
    monkeypatch.setattr(bench_train, "matmul_peak", lambda *settings: 4.0 * 128 * flops)
    out = tmp_path / "bench.json"
    bench_train.run(
        bench_train.Config(
            model=TINY,
            rows=2,
            sequence_length=32,
            only=("minnow", "transformers_fp32"),
            device="cpu",
            precision="fp32",
            json=str(out),
        )
    )
    # 64 tokens in the median times of 0.5 and 2 s.
    figures = {"minnow": 128.0, "transformers_fp32": 32.0, "peak_fraction": 0.25, "muon_seconds": 0.1}
    assert json.loads(out.read_text()) == pytest.approx(figures)
    shown = " ".join(capsys.readouterr().out.split())
    assert "16 to 64 │ 4.00x" in shown  # of 64 tokens in 4 s and in 1 s
    assert "float32 on cpu, 25% of the measured float32 matmul peak" in shown
    assert "A Muon step takes 100 ms: 20% of a step of 64 tokens." in shown  # 0.1 of 0.5 s


def test_unknown_contestant() -> None:
    with pytest.raises(UserError, match="--only vllm"):
        bench_train.run(bench_train.Config(model=TINY, only=("vllm",)))
