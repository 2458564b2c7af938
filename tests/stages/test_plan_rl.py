"""`minnow plan rl` against what models, optimizers and critics really hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from minnow import cli
from minnow.model.lora import LoraConfig
from minnow.model.pretrained import load_pretrained
from minnow.model.reward_model import RewardModel
from minnow.optim import OptimConfig, build_optimizers
from minnow.training.session import load_start
from tests.rl.helpers import saved


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("start") / "model")


def planned(start: Path, out: Path, preset: str, *more: str) -> dict:
    words = ["plan", "rl", "--preset", preset, "--init_from", str(start), "--sequence_length", "64", "--json", str(out)]
    words += ["--training.device", "cpu", "--training.precision", "fp32", "--training.micro_batch_tokens", "128"]
    assert cli.main([*words, *more]) == 0
    return json.loads(out.read_text())


def held(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, int, int]:
    """Bytes of weights, gradients and averages after one update."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    averages = [t for o in optimizers for state in o.state.values() for t in state.values()]
    return (
        sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        sum(t.nbytes for t in averages if isinstance(t, torch.Tensor) and t.ndim),
    )


@pytest.mark.parametrize("lora", [[], ["--lora.rank", "4"], ["--lora.rank", "4", "--lora.quantize", "int8"]])
def test_policy_and_reference(start: Path, tmp_path: Path, lora: list[str]) -> None:
    figures = planned(start, tmp_path / "plan.json", "grpo", *lora)
    config = LoraConfig(rank=4 if lora else 0, quantize="int8" if len(lora) > 2 else "none")
    model, _ = load_start(str(start), config, seed=0)
    policy = figures["policy"]
    assert (policy["weights"], policy["gradients"], policy["optimizer"]) == held(
        model, build_optimizers(model, OptimConfig(optimizer="adamw"))
    )
    reference = sum(parameter.nbytes for parameter in load_pretrained(start).parameters())
    assert figures["reference"] == (0 if lora else reference)  # with adapters it is the policy without them
    assert figures["critic"] == 0


def test_ppo_has_a_critic_of_its_own(start: Path, tmp_path: Path) -> None:
    figures = planned(start, tmp_path / "plan.json", "ppo")
    critic = RewardModel.from_language_model(load_pretrained(start))
    assert figures["critic"] == sum(held(critic, [torch.optim.AdamW(critic.parameters())]))
    # Two layers of keys and values for one head of 16 in float32, 128 episodes of 64 tokens, blocks and window.
    assert figures["keys_and_values"] == 2 * 128 * 64 * (2 * 2 * 16 * 4)
    parts = figures["policy"]["activations"] + sum(figures["policy"][k] for k in ("weights", "gradients", "optimizer"))
    assert figures["total"] == parts + figures["reference"] + figures["critic"] + figures["keys_and_values"]
