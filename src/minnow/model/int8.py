"""Matrices of whole numbers from -127 to 127 with one scale a row: a quarter of fp32's memory, half of bf16's.

    W ~ diag(s) Q,   s_o = max_i |W_oi| / 127,   Q_oi = round(W_oi / s_o)

Q and s are frozen; what goes through them computes in x's dtype, so only the weights are rounded, once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q, int8 [..., O, I], and s, fp32 [..., O]. A row of zeros has the scale 1."""
    scale = weight.float().abs().amax(-1) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale


def from_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """diag(s) Q: int8 [..., O, I] and fp32 [..., O] -> fp32 [..., O, I]."""
    return weight.float() * scale.unsqueeze(-1)


def int8_linear(x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """diag(s) Q x without a matrix of another type being kept: x [..., I] -> [..., O], in x's dtype."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, weight_OI, scale_O)
    return _product(x, weight_OI, scale_O)


def _product(x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and x.numel() == x.shape[-1]:
        return _row_product(x, weight_OI, scale_O)
    # Whole numbers to 127 are exact in every dtype, and dividing by 128 is too: it keeps sums small enough for float16.
    y = F.linear(x / 128, weight_OI.to(x.dtype))
    return (y * (128 * scale_O)).to(x.dtype)


def _row_product(x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """For one token, as sums that the compiler fuses with the conversion: one byte is read for each weight.

    The way over bfloat16 is free, and keeps inductor from folding the conversion into a constant of four bytes each.
    """
    y_O = (weight_OI.to(torch.bfloat16).float() * x.flatten().float()).sum(-1) * scale_O
    return y_O.to(x.dtype).view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """The gradient in x is exact for the rounded weights, which have none; kept for it are they alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_O)
        return _product(x, weight_OI, scale_O)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight_OI, scale_O = ctx.saved_tensors
        return (grad * scale_O).to(grad.dtype) @ weight_OI.to(grad.dtype), None, None
