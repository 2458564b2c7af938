"""Sparse upcycling (2212.05055): a mixture of experts that begins as a trained dense model."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch

from minnow.config import UserError
from minnow.model.experts_config import ExpertsConfig
from minnow.model.moe import MoE
from minnow.model.transformer import MLP, CausalLM
from minnow.model.vision_language import VisionLanguageModel


@torch.no_grad()
def upcycle(dense: CausalLM, experts: ExpertsConfig, seed: int) -> CausalLM:
    """Build the mixture; everything but the experts and routers is the dense model's.

    softmax: every expert is the dense MLP, so that the weighted sum is it too (weights that sum to 1).
    sigmoid: the shared experts are the dense MLP; each routed one has its first inner units but adds nothing yet.
    Either way the mixture computes what the dense model did, until it is trained. UserError where widths forbid it.
    """
    config = dataclasses.replace(dense.config, experts=experts)
    width, inner = experts.moe_intermediate_size, config.intermediate_size
    if isinstance(dense, VisionLanguageModel):
        raise UserError(
            "--model.experts: the model of --init-from looks at pictures: upcycle the language model that it was made "
            "of, and give that a vision tower (minnow vlm)"
        )
    if dense.config.experts is not None:
        raise UserError("--model.experts: the model of --init-from has experts already; leave the setting out")
    if experts.scoring == "softmax" and width != inner:
        raise UserError(
            f"--model.experts.moe_intermediate_size is {width}: each expert starts as the dense MLP, give {inner}"
        )
    if experts.scoring == "softmax" and not experts.norm_topk_prob:
        raise UserError(
            "--model.experts: weights that do not sum to 1 change what the dense model computes; take "
            "num_experts_per_tok of 2 or more, and norm_topk_prob"
        )
    if experts.scoring == "sigmoid" and width * experts.n_shared_experts != inner:
        raise UserError(
            f"--model.experts: the shared experts start as the dense MLP, so moe_intermediate_size x n_shared_experts "
            f"({width * experts.n_shared_experts}) must be its width ({inner})"
        )
    mixture = CausalLM(config, seed=seed)
    mixture.load_state_dict(dense.state_dict(), strict=False)  # the MLPs that became experts have no place there
    for layer, old in zip(mixture.model.layers, dense.model.layers, strict=True):
        if isinstance(layer.mlp, MoE):
            _fill(layer.mlp, cast(MLP, old.mlp), width)
    mixture.compute_dtype, mixture.generation_config = dense.compute_dtype, dense.generation_config
    return mixture


def _fill(moe: MoE, dense: MLP, width: int) -> None:
    moe.experts.gate_proj.copy_(dense.gate_proj.weight[:width])
    moe.experts.up_proj.copy_(dense.up_proj.weight[:width])
    if moe.shared_experts is None:
        moe.experts.down_proj.copy_(dense.down_proj.weight)
    else:
        moe.shared_experts.load_state_dict(dense.state_dict())
        moe.experts.down_proj.zero_()
