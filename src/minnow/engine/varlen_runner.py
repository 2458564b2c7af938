"""The runner for CUDA in half precision: a kernel that reads the blocks, and decode steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listing
from contextlib import nullcontext
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minnow.engine.attention import VarlenAttention
from minnow.engine.cache import PagedCache
from minnow.engine.graphs import Capture, Recordings, padded_rows
from minnow.engine.looking import seen_in
from minnow.engine.prompt_logprobs import note_prompt_logprobs
from minnow.engine.runner import Decoder
from minnow.engine.scheduler import Chunk, Plan
from minnow.engine.sequence import Sequence
from minnow.model.config import ModelConfig
from minnow.model.switched import AdapterChoice
from minnow.transfer import to_device


class VarlenRunner:
    """Runs plans with a kernel that finds keys by a block table; steps that only decode are replayed.

    attend: `varlen_attn` or its like. The cache has one block more than are handed out: what rows that fill a
    recorded step up write to. capture: None records nothing.
    """

    def __init__(
        self,
        cache: PagedCache,
        config: ModelConfig,
        max_rows: int,
        attend: Callable[..., Tensor],
        capture: Capture | None,
    ):
        self.cache = cache
        self.adapters: AdapterChoice | None = None
        """Of a model that has several adapters to choose from; its steps are not recorded."""
        self._attend = attend
        self._recordings = Recordings(capture)
        self._context = config.max_position_embeddings
        self._spare_block = len(cache.keys[0]) - 1
        self._device = cache.keys[0].device
        self._width = -(-self._context // cache.block_size)
        most = padded_rows(max_rows)
        # What a recorded step reads; its addresses must not change. Of one kind, so that one copy brings all of it.
        self._inputs_BI = torch.zeros(most, 4 + self._width, dtype=torch.int64, device=self._device)
        self._cu_queries = torch.arange(most + 1, dtype=torch.int32, device=self._device)

    def forget(self) -> None:
        """The weights changed; if they lie where they lay, recorded steps still hold."""
        self._recordings.forget()

    def run(self, model: Decoder, plan: Plan) -> tuple[list[Sequence], Tensor]:
        """Compute the plan's chunks; the sequences whose last token was among them and their logits [B, V], fp32."""
        self.cache.copy(plan.copies)
        recordable = self._recordings.possible and self.adapters is None
        if recordable and all(chunk.count == 1 and chunk.reaches_end for chunk in plan.chunks):
            rows = [chunk.sequence for chunk in plan.chunks]
            return rows, self._decode(model, rows)
        return self._mixed(model, plan.chunks)

    def _decode(self, model: Decoder, rows: Listing[Sequence]) -> Tensor:
        size = padded_rows(len(rows))
        inputs_BI = decode_inputs(rows, size, self.cache.block_size, self._spare_block, self._width)
        self._inputs_BI[:size] = to_device(torch.from_numpy(inputs_BI), self._device)
        return self._recordings.run(model, size, lambda: self._static_step(model, size))[: len(rows)]

    def _static_step(self, model: Decoder, size: int) -> Tensor:
        tokens_B, positions_B, slots_B, lengths_B = self._inputs_BI[:size, :4].unbind(1)
        lengths_B = lengths_B.int()
        attention = VarlenAttention(
            self._attend,
            self.cache,
            slots_B,
            self._cu_queries[: size + 1],
            F.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0)),
            lengths_B,
            self._inputs_BI[:size, 4:].int(),
            max_queries=1,
            max_length=self._context,
        )
        return model.logits(model(tokens_B[:, None], positions_B[:, None], attention)[:, 0])

    def _mixed(self, model: Decoder, chunks: list[Chunk]) -> tuple[list[Sequence], Tensor]:
        spans = [(chunk.sequence, chunk.start, chunk.start + chunk.count) for chunk in chunks]
        tokens_N = self._tensor([token for sequence, start, end in spans for token in sequence.tokens[start:end]])
        positions_N = self._tensor(np.concatenate([np.arange(start, end) for _, start, end in spans]))
        counts, lengths = [chunk.count for chunk in chunks], [end for _, _, end in spans]
        attention = VarlenAttention(
            self._attend,
            self.cache,
            self._tensor(np.concatenate([self.cache.slots(*span) for span in spans])),
            self._tensor(list(accumulate(counts, initial=0))).int(),
            self._tensor(list(accumulate(lengths, initial=0))).int(),
            self._tensor(lengths).int(),
            self._tensor(block_table([chunk.sequence.blocks for chunk in chunks], self._width)).int(),
            max_queries=max(counts),
            max_length=max(lengths),
        )
        choice = [(chunk.sequence.params.adapter, chunk.count) for chunk in chunks]
        with nullcontext() if self.adapters is None else self.adapters.of(choice, self._device):
            hidden_BTD = model(tokens_N[None], positions_N[None], attention, images=seen_in(chunks, 0))
        note_prompt_logprobs(model, hidden_BTD[0], chunks)
        ends = zip(chunks, accumulate(counts), strict=True)
        last = [(chunk.sequence, end - 1) for chunk, end in ends if chunk.reaches_end]
        return [row for row, _ in last], model.logits(hidden_BTD[0, self._tensor([place for _, place in last])])

    def _tensor(self, numbers: Listing[object] | np.ndarray) -> Tensor:
        return to_device(torch.as_tensor(numbers, dtype=torch.int64), self._device)


def decode_inputs(rows: Listing[Sequence], size: int, block_size: int, spare_block: int, width: int) -> np.ndarray:
    """What a recorded step of `size` rows reads, int64 [size, 4 + width]: each row's token, position, slot, length and
    block table. Rows beyond the given ones write one token into the spare block and see only that."""
    inputs = np.zeros((size, 4 + width), dtype=np.int64)
    inputs[:, 2:5] = spare_block * block_size, 1, spare_block
    for i, row in enumerate(rows):
        place = row.computed
        slot = row.blocks[place // block_size] * block_size + place % block_size
        inputs[i, :4] = row.tokens[place], place, slot, place + 1
    inputs[: len(rows), 4:] = block_table([row.blocks for row in rows], width)
    return inputs


def block_table(tables: Listing[Listing[int]], width: int) -> np.ndarray:
    """The sequences' blocks as int64 [S, width]; filled up with block 0, which their lengths keep from being read."""
    table = np.zeros((len(tables), width), dtype=np.int64)
    for row, blocks in enumerate(tables):
        table[row, : len(blocks)] = blocks
    return table
