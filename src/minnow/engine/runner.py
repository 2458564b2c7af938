"""One forward pass over the chunks of a plan."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from minnow.engine.attention import DecodeAttention, MixedAttention
from minnow.engine.cache import PagedCache, Window
from minnow.engine.compiled import CompiledDecode
from minnow.engine.graphs import Capture, Recordings, padded_rows
from minnow.engine.looking import seen_in
from minnow.engine.prompt_logprobs import note_prompt_logprobs
from minnow.engine.scheduler import Chunk, Plan
from minnow.engine.sequence import Sequence
from minnow.model.attention import Attention
from minnow.model.config import ModelConfig
from minnow.model.switched import AdapterChoice
from minnow.model.transformer import ImageEmbeddings
from minnow.transfer import to_device

MASK_STEP = 64
"""Places by which the mask of rows of unequal length grows."""


class Decoder(Protocol):
    """What runs: the live module or a packed copy of it."""

    config: ModelConfig
    compute_dtype: torch.dtype

    def __call__(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attention: Attention,
        *,
        images: ImageEmbeddings | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> fp32 [..., V]."""
        ...


class Runner:
    """Attention by a dense window and gathered blocks: on any device, in any number format.

    capture: on CUDA, records steps in which every row decodes. The cache has one block more then than are handed out:
    what rows that fill a recorded step up write to.
    """

    def __init__(self, cache: PagedCache, window: Window, capture: Capture | None = None):
        self.cache = cache
        self.window = window
        self.compiled: CompiledDecode | None = None
        """Takes steps in which every row decodes."""
        self.adapters: AdapterChoice | None = None
        """Of a model that has several adapters to choose from."""
        self._device = cache.keys[0].device
        dtype = cache.keys[0].dtype
        self._places_T = torch.arange(window.length, device=self._device)
        self._open = torch.zeros(1, 1, 1, window.length, dtype=dtype, device=self._device)
        self._barred = torch.tensor(-torch.inf, dtype=dtype, device=self._device)
        self._recordings = Recordings(capture)
        # What a recorded step reads (token, position, slot of each row); its addresses must not change.
        self._inputs_B3 = torch.zeros(len(window.keys[0]), 3, dtype=torch.int64, device=self._device)

    def forget(self) -> None:
        """The weights changed."""
        self.window.clear()
        self._recordings.forget()
        if self.compiled is not None and self.compiled.constant_weights:  # recordings of it hold them too
            self._recordings.clear()
            self.compiled = None

    def run(self, model: Decoder, plan: Plan) -> tuple[list[Sequence], Tensor]:
        """Compute the plan's chunks; the sequences whose last token was among them and their logits [B, V], fp32."""
        self.cache.copy(plan.copies)
        decoding: list[Chunk] = []
        others: list[Chunk] = []
        for chunk in plan.chunks:
            decodes = chunk.count == 1 and chunk.start > 0 and chunk.reaches_end
            (decoding if decodes else others).append(chunk)
        rows = self.window.arrange([chunk.sequence for chunk in decoding], self.cache)
        if others:
            return self._mixed(model, rows, sorted(others, key=lambda chunk: chunk.start > 0))
        if self._recordings.possible and self.adapters is None:
            return rows, self._recorded(model, rows)
        tokens_B, *where = self._decode_inputs(rows)
        if self.compiled is not None:
            return rows, self.compiled(tokens_B, *where)
        attention = DecodeAttention(self.cache, self.window, *where)
        with self._adapted(rows, []):
            return rows, model.logits(model(tokens_B[:, None], where[0][:, None], attention)[:, 0])

    def _recorded(self, model: Decoder, rows: list[Sequence]) -> Tensor:
        size = min(padded_rows(len(rows)), len(self._inputs_B3))
        reach = min(padded_reach(max(row.computed for row in rows) + 1), self.window.length)
        inputs_B3 = np.zeros((size, 3), dtype=np.int64)
        block = self.cache.block_size
        inputs_B3[:, 2] = (len(self.cache.keys[0]) - 1) * block  # the spare block
        for i, row in enumerate(rows):
            place = row.computed
            inputs_B3[i] = row.tokens[place], place, row.blocks[place // block] * block + place % block
        self._inputs_B3[:size] = to_device(torch.from_numpy(inputs_B3), self._device)
        return self._recordings.run(model, (size, reach), lambda: self._static_step(model, size, reach))[: len(rows)]

    def _static_step(self, model: Decoder, size: int, reach: int) -> Tensor:
        tokens_B, positions_B, slots_B = self._inputs_B3[:size].unbind(1)
        where = positions_B, slots_B, self._mask(positions_B, reach)
        if self.compiled is not None:
            return self.compiled(tokens_B, *where)
        attention = DecodeAttention(self.cache, self.window, *where)
        return model.logits(model(tokens_B[:, None], positions_B[:, None], attention)[:, 0])

    def _mixed(self, model: Decoder, rows: list[Sequence], chunks: list[Chunk]) -> tuple[list[Sequence], Tensor]:
        spans = [(chunk.sequence, chunk.start, chunk.start + chunk.count) for chunk in chunks]
        tokens_N = self._tensor([token for sequence, start, end in spans for token in sequence.tokens[start:end]])
        positions_N = self._tensor(np.concatenate([np.arange(start, end) for _, start, end in spans]))
        slots_N = self._tensor(np.concatenate([self.cache.slots(*span) for span in spans]))
        decode = None
        if rows:
            tokens_B, *where = self._decode_inputs(rows)
            decode = DecodeAttention(self.cache, self.window, *where)
            tokens_N, positions_N = torch.cat((tokens_B, tokens_N)), torch.cat((where[0], positions_N))
        attention = MixedAttention(self.cache, decode, len(rows), chunks, slots_N)
        with self._adapted(rows, chunks):
            hidden_BTD = model(tokens_N[None], positions_N[None], attention, images=seen_in(chunks, len(rows)))
        note_prompt_logprobs(model, hidden_BTD[0, len(rows) :], chunks)
        ends = np.cumsum([chunk.count for chunk in chunks]) + len(rows) - 1
        last = [*range(len(rows)), *(int(end) for chunk, end in zip(chunks, ends, strict=True) if chunk.reaches_end)]
        finished = [*rows, *(chunk.sequence for chunk in chunks if chunk.reaches_end)]
        return finished, model.logits(hidden_BTD[0, self._tensor(last)])

    def _adapted(self, rows: list[Sequence], chunks: list[Chunk]) -> AbstractContextManager[None]:
        if self.adapters is None:
            return nullcontext()
        spans = [(row, 1) for row in rows] + [(chunk.sequence, chunk.count) for chunk in chunks]
        return self.adapters.of([(sequence.params.adapter, count) for sequence, count in spans], self._device)

    def _decode_inputs(self, rows: Listing[Sequence]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of every decoding row: its last token, that one's place and slot, int64, and the mask [B, 1, 1, T]."""
        size = self.cache.block_size
        lengths = [row.computed for row in rows]
        slots = [row.blocks[length // size] * size + length % size for row, length in zip(rows, lengths, strict=True)]
        inputs_3B = self._tensor([[row.tokens[-1] for row in rows], lengths, slots])
        reach, positions_B = max(lengths) + 1, inputs_3B[1]
        if len(rows) == 1:
            return inputs_3B[0], positions_B, inputs_3B[2], self._open[..., :reach]
        # In steps of MASK_STEP, so that memory of one size is asked for again and again.
        reach = min(-(-reach // MASK_STEP) * MASK_STEP, self.window.length)
        return inputs_3B[0], positions_B, inputs_3B[2], self._mask(positions_B, reach)

    def _mask(self, positions_B: Tensor, reach: int) -> Tensor:
        """[B, 1, 1, T]: -inf on the first `reach` places that lie behind a row's."""
        mask_BT = torch.where(self._places_T[:reach] > positions_B[:, None], self._barred, self._open[0, 0, :, :reach])
        return mask_BT[:, None, None]

    def _tensor(self, numbers: Listing[object] | np.ndarray) -> Tensor:
        return to_device(torch.as_tensor(numbers, dtype=torch.int64), self._device)


def padded_reach(length: int) -> int:
    """Places that a recorded step looks at for rows up to so long: 256, 512, 1024 and so on."""
    return max(256, 1 << (length - 1).bit_length())
