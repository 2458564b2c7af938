"""B1: with one expert a token, MiniMind normalised the one weight to 1; its router learned nothing from the text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from model_helpers import tiny_model

from minnow.model.attention import CausalAttention
from minnow.model.experts_config import ExpertsConfig

GATE = "model.layers.1.mlp.gate.weight"


def router_gradient(experts: ExpertsConfig) -> torch.Tensor:
    """Of the language-model loss alone: no balance loss is anywhere near."""
    model = tiny_model(experts=experts)
    tokens = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    hidden = model(tokens, torch.arange(20).expand(2, -1), CausalAttention())
    loss = torch.nn.functional.cross_entropy(model.logits(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return torch.autograd.grad(loss, dict(model.named_parameters())[GATE])[0]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_router_learns_from_the_text(scoring: str, k: int) -> None:
    experts = ExpertsConfig(
        num_experts=4,
        num_experts_per_tok=k,
        moe_intermediate_size=16,
        scoring=scoring,
        n_shared_experts=int(scoring == "sigmoid"),
    )
    assert experts.router_learns
    assert router_gradient(experts).abs().max() > 1e-5


def test_the_bug_would_be_seen() -> None:
    broken = ExpertsConfig(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=16, norm_topk_prob=True)
    assert not broken.router_learns
    assert router_gradient(broken).abs().max() < 1e-7
