"""The runner for CUDA in half precision: a kernel that reads the blocks, and decode steps as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from collections.abc import Sequence as Listing
from contextlib import nullcontext
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from minnow.engine.attention import VarlenAttention
from minnow.engine.cache import PagedCache
from minnow.engine.runner import Decoder
from minnow.engine.scheduler import Chunk, Plan
from minnow.engine.sequence import Sequence
from minnow.model.config import ModelConfig
from minnow.model.switched import AdapterChoice

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records a function of no arguments: how to run it again, and where its result will stand."""


def capture_cuda_graph(function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Record the kernels of `function`: replayed, they are launched at once, without Python in between."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):  # what is made on first use is made before the recording
            function()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def padded_rows(rows: int) -> int:
    """Rows that a recorded step has for so many: 1, 2, 4, 8, then multiples of 16."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 16) * 16


class VarlenRunner:
    """Runs plans with a kernel that finds keys by a block table; steps that only decode are replayed.

    attend: `varlen_attn` or its like. The cache has one block more than are handed out: what rows that fill a
    recorded step up write to. A recorded step reads the weights where they lay, so it is dropped where they
    moved.
    """

    def __init__(
        self,
        cache: PagedCache,
        config: ModelConfig,
        max_rows: int,
        attend: Callable[..., Tensor],
        capture: Capture | None = capture_cuda_graph,
    ):
        self.cache = cache
        self.adapters: AdapterChoice | None = None
        """Of a model that has several adapters to choose from; its steps are not recorded."""
        self._attend = attend
        self._capture = capture
        self._context = config.max_position_embeddings
        self._spare_block = len(cache.keys[0]) - 1
        self._device = cache.keys[0].device
        self._width = -(-self._context // cache.block_size)
        most = padded_rows(max_rows)
        # What a recorded step reads; its addresses must not change.
        self._inputs_3B = torch.zeros(3, most, dtype=torch.int64, device=self._device)
        self._lengths_B = torch.ones(most, dtype=torch.int32, device=self._device)
        self._cu_lengths = torch.zeros(most + 1, dtype=torch.int32, device=self._device)
        self._cu_queries = torch.arange(most + 1, dtype=torch.int32, device=self._device)
        self._table = torch.full((most, self._width), self._spare_block, dtype=torch.int32, device=self._device)
        self._recorded: dict[int, tuple[Replay, Tensor]] = {}
        self._weights: tuple[int, ...] = ()
        self._recorded_for: tuple[int, ...] = ()

    def forget(self) -> None:
        """The weights changed; if they lie where they lay, recorded steps still hold."""
        self._weights = ()

    def run(self, model: Decoder, plan: Plan) -> tuple[list[Sequence], Tensor]:
        """Compute the plan's chunks; the sequences whose last token was among them and their logits [B, V], fp32."""
        self.cache.copy(plan.copies)
        recordable = self._capture is not None and self.adapters is None
        if recordable and all(chunk.count == 1 and chunk.reaches_end for chunk in plan.chunks):
            rows = [chunk.sequence for chunk in plan.chunks]
            return rows, self._decode(model, rows)
        return self._mixed(model, plan.chunks)

    def _decode(self, model: Decoder, rows: Listing[Sequence]) -> Tensor:
        size = padded_rows(len(rows))
        inputs, lengths, table = decode_inputs(rows, size, self.cache.block_size, self._spare_block, self._width)
        self._inputs_3B[:, :size] = torch.from_numpy(inputs).to(self._device)
        self._lengths_B[:size] = torch.from_numpy(lengths).to(self._device)
        self._cu_lengths[1 : size + 1] = self._lengths_B[:size].cumsum(0)
        self._table[:size] = torch.from_numpy(table).to(self._device)
        self._drop_if_weights_moved(model)
        if size not in self._recorded and self._capture is not None:
            try:
                self._recorded[size] = self._capture(lambda: self._static_step(model, size))
            except RuntimeError as error:  # a layer that looks at its data, such as one with routed experts
                warnings.warn(f"decode steps are not recorded as CUDA graphs: {error}", stacklevel=2)
                self._capture = None
        if self._capture is None:
            return self._static_step(model, size)[: len(rows)]
        replay, logits_BV = self._recorded[size]
        replay()
        return logits_BV[: len(rows)]

    def _static_step(self, model: Decoder, size: int) -> Tensor:
        tokens_B, positions_B, slots_B = self._inputs_3B[:, :size]
        attention = VarlenAttention(
            self._attend,
            self.cache,
            slots_B,
            self._cu_queries[: size + 1],
            self._cu_lengths[: size + 1],
            self._lengths_B[:size],
            self._table[:size],
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
            torch.from_numpy(block_table([chunk.sequence.blocks for chunk in chunks], self._width)).to(self._device),
            max_queries=max(counts),
            max_length=max(lengths),
        )
        choice = [(chunk.sequence.params.adapter, chunk.count) for chunk in chunks]
        with nullcontext() if self.adapters is None else self.adapters.of(choice, self._device):
            hidden_BTD = model(tokens_N[None], positions_N[None], attention)
        ends = zip(chunks, accumulate(counts), strict=True)
        last = [(chunk.sequence, end - 1) for chunk, end in ends if chunk.reaches_end]
        return [row for row, _ in last], model.logits(hidden_BTD[0, self._tensor([place for _, place in last])])

    def _drop_if_weights_moved(self, model: Decoder) -> None:
        if not self._weights:
            assert isinstance(model, torch.nn.Module)
            weights = tuple(parameter.data_ptr() for parameter in model.parameters())
            if weights != self._recorded_for:
                self._recorded.clear()
            self._weights = self._recorded_for = weights

    def _tensor(self, numbers: Listing[object] | np.ndarray) -> Tensor:
        return torch.as_tensor(numbers, dtype=torch.int64).to(self._device)


def decode_inputs(
    rows: Listing[Sequence], size: int, block_size: int, spare_block: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a recorded step of `size` rows reads: (token, position, slot) int64 [3, size]; lengths int32 [size]; block
    table int32 [size, width]. Rows beyond the given ones write one token into the spare block and see only that."""
    inputs = np.zeros((3, size), dtype=np.int64)
    inputs[2] = spare_block * block_size
    lengths = np.ones(size, dtype=np.int32)
    for i, row in enumerate(rows):
        place = row.computed
        inputs[:, i] = row.tokens[place], place, row.blocks[place // block_size] * block_size + place % block_size
        lengths[i] = place + 1
    return inputs, lengths, block_table([row.blocks for row in rows] + [[spare_block]] * (size - len(rows)), width)


def block_table(tables: Listing[Listing[int]], width: int) -> np.ndarray:
    """The sequences' blocks as int32 [S, width]; filled up with block 0, which their lengths keep from being read."""
    table = np.zeros((len(tables), width), dtype=np.int32)
    for row, blocks in enumerate(tables):
        table[row, : len(blocks)] = blocks
    return table
