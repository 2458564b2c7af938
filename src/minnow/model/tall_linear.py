"""x W^T for a W with many more rows than columns, whose gradient is multiplied as is fast on a CPU in bf16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pays(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether to take `tall_linear`: in a compiled training step on a CPU in bf16, for twice as many rows as columns.

    Compiled, since the copy of x^T is written then by what computes x.
    """
    outputs, inputs = weight_OI.shape
    training = torch.compiler.is_compiling() and torch.is_grad_enabled()
    return training and x.device.type == "cpu" and x.dtype == torch.bfloat16 and outputs >= 2 * inputs


def tall_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x [..., I] -> x W^T [..., O], both of one dtype.

    The gradient of W is g^T x, a product whose left factor lies transposed, for which the library takes nearly twice as
    long. It is the transpose of x^T g as well, and of the two, x is the smaller one to copy into the order that is
    fast (docs/experiments.md has the figures).
    """
    y: Tensor = _TallLinear.apply(x, weight_OI)
    return y


class _TallLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(x, weight_OI)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_x = grad @ weight_OI if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        return grad_x, (x.flatten(0, -2).T.contiguous() @ grad.flatten(0, -2)).T
