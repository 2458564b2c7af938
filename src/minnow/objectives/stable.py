"""Logarithms that keep their digits where the obvious formula loses them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact near 0 and far from it (Mächler 2012); x = 0 counts as the next number below."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near_zero = x > -math.log(2)
    # torch.where computes both branches; the one not taken gets a harmless argument, or its gradient would be NaN.
    expm1 = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    return torch.where(near_zero, expm1, torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x))))
