"""A decode step as one compiled function: at a few million parameters a step's cost is in its calls."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from minnow.engine.attention import DecodeAttention
from minnow.engine.cache import PagedCache, Window
from minnow.engine.packed import PackedModel


def decode_step(
    model: PackedModel,
    cache: PagedCache,
    window: Window,
    tokens_B: Tensor,
    positions_B: Tensor,
    slots_B: Tensor,
    mask_B11T: Tensor,
) -> Tensor:
    """Logits [B, V] after one more token of the window's first B rows; see `DecodeAttention`."""
    attention = DecodeAttention(cache, window, positions_B, slots_B, mask_B11T)
    return model.logits(model(tokens_B[:, None], positions_B[:, None], attention)[:, 0])


class CompiledDecode:
    """`decode_step`, compiled with the weights as constants, so that they are laid out as the products want them.

    Two variants, for one row and for any number of rows; the length is free in both. Each takes about a minute to
    make, on its first use. Where compiling fails the plain function goes on, with a warning.
    """

    def __init__(self, model: PackedModel, cache: PagedCache, window: Window):
        self._parts = (model, cache, window)
        self._step = torch.compile(decode_step, fullgraph=True)
        self._made: set[bool] = set()

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, slots_B: Tensor, mask_B11T: Tensor) -> Tensor:
        """Logits [B, V]."""
        inputs = (tokens_B, positions_B, slots_B, mask_B11T)
        single = tokens_B.shape[0] == 1
        if single in self._made:
            return self._step(*self._parts, *inputs)
        torch._dynamo.mark_dynamic(mask_B11T, 3)
        for tensor in () if single else inputs:
            torch._dynamo.mark_dynamic(tensor, 0)
        self._made.add(single)
        try:
            import torch._inductor.config as inductor  # late: it takes a while

            # Freezing is asked for while tracing, so it cannot be one of torch.compile's options.
            with inductor.patch(freezing=True, max_autotune=True):
                return self._step(*self._parts, *inputs)
        except Exception as error:
            warnings.warn(f"the decode step could not be compiled and runs as it is: {error}", stacklevel=2)
            self._step = decode_step
            return self._step(*self._parts, *inputs)
