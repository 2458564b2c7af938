"""Gradient checkpointing (1604.06174): keep less of the forward pass, compute it again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Result = TypeVar("Result")
GradientCheckpointing = Literal["off", "selective", "full"]

_EXPENSIVE = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_grouped_mm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "minnow::cpu_causal_attention",
    }
)


def keeps_output(operation: Any) -> bool:
    """Whether "selective" keeps what this aten operation returns: matrix products and attention."""
    return operation._overloadname == "default" and operation._schema.name in _EXPENSIVE


def checkpointed(mode: GradientCheckpointing, run: Callable[..., Result], *arguments: Any) -> Result:
    """run(*arguments), keeping the arguments only ("full") or the results of products and attention too ("selective",
    2205.05198): then norms, rotations and activations are computed again, which costs next to nothing."""
    if mode == "off":
        return run(*arguments)
    more: dict[str, Any] = {}
    if mode == "selective":
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    result: Result = checkpoint(run, *arguments, use_reentrant=False, **more)
    return result


def _policy(context: Any, operation: torch._ops.OpOverload, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps_output(operation) else CheckpointPolicy.PREFER_RECOMPUTE
