"""The copies that play and score beside a policy in slices are in the formats that its slices are gathered in."""

from dataclasses import replace

import torch

from minnow.model.experts_config import ExpertsConfig
from minnow.model.transformer import CausalLM
from minnow.rl.gathered_engine import as_computed
from tests.training.helpers import SHAPE


def test_all_is_rounded_but_routers() -> None:
    """A rounded router would play with other experts than the one that learns."""
    shape = replace(SHAPE, experts=ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    model = as_computed(CausalLM(shape, seed=1), torch.device("cpu"), torch.bfloat16)
    exact = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert exact == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(shape.num_hidden_layers)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
