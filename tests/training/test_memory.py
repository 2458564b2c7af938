"""How a model is held in memory while it is trained."""

from __future__ import annotations

from dataclasses import replace

import torch

from minnow.model.experts_config import ExpertsConfig
from minnow.model.lora import LoraConfig, add_lora
from minnow.model.quantize import quantize
from minnow.model.transformer import CausalLM
from minnow.training.memory import hold_in_memory

from .helpers import SHAPE


def test_frozen_matrices_are_held_in_the_compute_dtype_but_for_what_is_read_in_fp32() -> None:
    """The scales of int8 experts were rounded to bf16, by up to 0.4%, and the routers with them."""
    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model = CausalLM(replace(SHAPE, experts=experts), seed=1)
    quantize(model)
    add_lora(model, LoraConfig(rank=2), base="")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    hold_in_memory(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        held = torch.float32
        if name.endswith("embed_tokens.weight"):
            held = torch.bfloat16
        elif before[name].dtype == torch.int8:
            held = torch.int8
        assert parameter.dtype == held, name
        if held != torch.bfloat16:
            assert torch.equal(parameter, before[name]), name
