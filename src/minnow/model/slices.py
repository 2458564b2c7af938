"""Tensors that several processes hold in slices (FSDP2's DTensor)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sliced(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether several processes hold `tensor` in slices. A process alone is spared the import, which takes a second."""
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor that `tensor` is a slice of, gathered from all processes; a plain one as it is."""
    return tensor.full_tensor() if is_sliced(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's slice of `tensor`, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if is_sliced(tensor) else tensor


@contextmanager
def examined(model: nn.Module) -> Iterator[None]:
    """Let `model` compute without gradients and without dropout; afterwards it is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        release(model)


def release(model: nn.Module) -> None:
    """Free what a forward pass has gathered of a model in slices and no backward pass has freed.

    Until then `parameters()` gives the gathered tensors: an optimizer that was built on those would train nothing.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def writes() -> bool:
    """Whether this process is the one that writes what all hold."""
    return not dist.is_initialized() or dist.get_rank() == 0
