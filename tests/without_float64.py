"""A device that has no float64, as Apple's GPUs have none, played on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class WithoutFloat64(TorchFunctionMode):
    """Refuses `double` to what a model has computed and nobody has fetched with `cpu`. Whole numbers, such as borders
    of pieces, count as lying on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        doubles = func is torch.Tensor.double and args[0].is_floating_point()
        if doubles and not getattr(args[0], "fetched", False):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            result = result.clone()
            result.fetched = True
        return result
