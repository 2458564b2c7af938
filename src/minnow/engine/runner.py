"""One forward pass over the chunks of a plan."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listing
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from minnow.engine.attention import DecodeAttention, MixedAttention, decode_mask
from minnow.engine.cache import PagedCache, Window
from minnow.engine.scheduler import Chunk, Plan
from minnow.engine.sequence import Sequence
from minnow.model.attention import Attention
from minnow.model.config import ModelConfig

REACH_STEP = 64
"""The mask's length grows in these steps, so that memory of one size is asked for again and again."""


class Decoder(Protocol):
    """What runs: the live module or a packed copy of it."""

    config: ModelConfig
    compute_dtype: torch.dtype

    def __call__(self, tokens_BT: Tensor, positions_BT: Tensor, attention: Attention) -> Tensor:
        """Hidden states [B, T, D]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> fp32 [..., V]."""
        ...


Rows = list[tuple[Sequence, Tensor]]


class Runner:
    """Attention by a dense window and gathered blocks: on any device, in any number format."""

    def __init__(self, cache: PagedCache, window: Window):
        self.cache = cache
        self._window = window
        self._device = cache.keys[0].device
        self._compiled: Callable[..., Tensor] | None = None

    def forget(self) -> None:
        """The weights changed."""
        self._window.clear()

    def run(self, model: Decoder, plan: Plan) -> tuple[list[Sequence], Tensor]:
        """Compute the plan's chunks; the sequences whose last token was among them and their logits [B, V], fp32."""
        self.cache.copy(plan.copies)
        decoding = [chunk for chunk in plan.chunks if chunk.count == 1 and chunk.start > 0 and chunk.reaches_end]
        rows = self._window.arrange([chunk.sequence for chunk in decoding], self.cache)
        if len(decoding) == len(plan.chunks):
            return rows, self._decode(model, rows)
        others = sorted((chunk for chunk in plan.chunks if chunk not in decoding), key=lambda chunk: chunk.start > 0)
        return self._mixed(model, rows, others)

    def _decode(self, model: Decoder, rows: Listing[Sequence]) -> Tensor:
        tokens_B, positions_B, slots_B = self._inputs(rows)
        attention = self._decode_attention(model, rows, positions_B, slots_B)
        hidden_BTD = model(tokens_B[:, None], positions_B[:, None], attention)
        return model.logits(hidden_BTD[:, 0])

    def _mixed(self, model: Decoder, rows: list[Sequence], chunks: list[Chunk]) -> tuple[list[Sequence], Tensor]:
        tokens_B, positions_B, slots_B = self._inputs(rows)
        decode = self._decode_attention(model, rows, positions_B, slots_B) if rows else None
        spans = [(chunk.sequence, chunk.start, chunk.start + chunk.count) for chunk in chunks]
        tokens_N = self._tensor([token for sequence, start, end in spans for token in sequence.tokens[start:end]])
        positions_N = self._tensor(np.concatenate([np.arange(start, end) for _, start, end in spans]))
        slots_N = self._tensor(np.concatenate([self.cache.slots(*span) for span in spans]))
        hidden_BTD = model(
            torch.cat((tokens_B, tokens_N))[None],
            torch.cat((positions_B, positions_N))[None],
            MixedAttention(self.cache, decode, len(rows), chunks, slots_N),
        )
        ends = np.cumsum([chunk.count for chunk in chunks]) + len(rows) - 1
        last = [*range(len(rows)), *(int(end) for chunk, end in zip(chunks, ends, strict=True) if chunk.reaches_end)]
        finished = [*rows, *(chunk.sequence for chunk in chunks if chunk.reaches_end)]
        return finished, model.logits(hidden_BTD[0, self._tensor(last)])

    def _inputs(self, rows: Listing[Sequence]) -> tuple[Tensor, Tensor, Tensor]:
        """Last token, place and slot of every decoding row, int64."""
        size = self.cache.block_size
        slots = [row.blocks[row.computed // size] * size + row.computed % size for row in rows]
        inputs_3B = self._tensor([[row.tokens[row.computed] for row in rows], [row.computed for row in rows], slots])
        return inputs_3B[0], inputs_3B[1], inputs_3B[2]

    def _decode_attention(
        self, model: Decoder, rows: Listing[Sequence], positions_B: Tensor, slots_B: Tensor
    ) -> DecodeAttention:
        lengths = [row.computed for row in rows]
        reach, mask_B11T = max(lengths) + 1, None
        if min(lengths) + 1 < reach:
            reach = min(-(-reach // REACH_STEP) * REACH_STEP, model.config.max_position_embeddings)
            mask_B11T = decode_mask(positions_B, reach, model.compute_dtype)
        return DecodeAttention(self.cache, self._window, positions_B, slots_B, reach, mask_B11T)

    def _tensor(self, numbers: Listing[object] | np.ndarray) -> Tensor:
        return torch.as_tensor(numbers, dtype=torch.int64).to(self._device)
