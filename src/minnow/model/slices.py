"""Tensors that several processes hold in slices (FSDP2's DTensor)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor that `tensor` is a slice of, gathered from all processes; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's slice of `tensor`, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def writes() -> bool:
    """Whether this process is the one that writes what all hold."""
    return not dist.is_initialized() or dist.get_rank() == 0
