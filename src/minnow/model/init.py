"""Initial weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """How a model's weights are drawn; the defaults follow the fastest public recipes (modded-nanogpt,
    nanochat)."""

    embedding_std: float = 0.02
    """Standard deviation of the embedding (and of an untied output head)."""
    matrix_gain: float = 0.5
    """Standard deviation of a matrix is this over the square root of its inputs."""
    zero_output_projections: bool = True
    """Start o_proj and down_proj at zero: every layer begins as the identity."""
    max_attention_logit: float = 15.5
    """With QK-norm, the greatest attention logit at the start: sqrt(head_dim) * gain^2 (gain 1.39 at
    head_dim 64, 1.17 at 128). 0 leaves the gains of q_norm and k_norm at 1."""


_OUTPUTS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


@torch.no_grad()
def initialize(model: nn.Module, config: InitConfig, seed: int) -> None:
    """Draw every parameter of `model`, in order, from one generator on the CPU, so that the device does not
    matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.ndim == 1:
            parameter.fill_(_vector_value(name, parameter, config))
        elif name.endswith("gate.noise_weight") or (config.zero_output_projections and name.endswith(_OUTPUTS)):
            parameter.zero_()  # the noise too: one standard deviation for all experts, log 2 (1701.06538, appendix A)
        else:
            is_table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            inputs = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]  # 4: a patch of a picture
            if name.endswith("position_embedding.weight"):
                inputs = 1  # looked up: a place weighs as much as the patch that stands there
            std = config.embedding_std if is_table else config.matrix_gain / math.sqrt(inputs)
            drawn = torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)


def _vector_value(name: str, parameter: Tensor, config: InitConfig) -> float:
    if name.endswith(".bias"):
        return 0.0
    if name.endswith(("q_norm.weight", "k_norm.weight")) and config.max_attention_logit > 0:
        head_dim = parameter.shape[0]
        return math.sqrt(config.max_attention_logit / math.sqrt(head_dim))
    return 1.0
