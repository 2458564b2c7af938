"""The KV cache in blocks, and a dense window on the rows that decode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Listing

import numpy as np
import torch
from torch import Tensor

from minnow.cpu import cpu_multiplies_bf16_faster
from minnow.engine.sequence import Sequence
from minnow.model.config import ModelConfig
from minnow.model.cpu_attention import kernel_for
from minnow.transfer import to_device


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory for the keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


class PagedCache:
    """Keys and values of every layer, [blocks, block_size, K, d] each.

    Token t of a sequence stands in slot `blocks[t // block_size] * block_size + t % block_size`. On the CPU the memory
    is only taken as blocks are first written to.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        self.block_size = block_size
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def slots(self, sequence: Sequence, start: int, end: int) -> np.ndarray:
        """Slots of the sequence's tokens `start` to `end`, int64."""
        size = self.block_size
        blocks = np.array(sequence.blocks[start // size : -(-end // size)], dtype=np.int64)
        slots = (blocks[:, None] * size + np.arange(size)).ravel()
        return slots[start % size : start % size + end - start]

    def write(self, layer: int, slots_N: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> None:
        """Put token n's key and value into slot n."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots_N, k_NKd)
        self.values[layer].flatten(0, 1).index_copy_(0, slots_N, v_NKd)

    def read(self, layer: int, slots_N: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, K, d] of these slots."""
        return (
            self.keys[layer].flatten(0, 1).index_select(0, slots_N),
            self.values[layer].flatten(0, 1).index_select(0, slots_N),
        )

    def copy(self, copies: Mapping[int, int]) -> None:
        """Fill blocks (keys) with what other blocks (values) held before the call."""
        if not copies:
            return
        device = self.keys[0].device
        targets, sources = (to_device(torch.tensor(list(x)), device) for x in (copies.keys(), copies.values()))
        for store in (*self.keys, *self.values):
            store.index_copy_(0, targets, store.index_select(0, sources))


class Window:
    """A dense copy of the rows that decode: [rows, length, K, d] for every layer.

    Reading a row's blocks anew for every token would copy its whole past every time. The window keeps it
    instead: a row is gathered from its blocks once, when it begins to decode, and then grows by its own token
    a step. It starts as zeros, not as raw memory: places that a row has not filled are barred from its
    attention, but a weight of 0 times a chance NaN would still be NaN. On the CPU untouched zeros take no memory.
    """

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device):
        shape = (rows, config.max_position_embeddings, config.num_key_value_heads, config.head_dim)
        self.length = config.max_position_embeddings
        self.keys = [_lazy_zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        self.values = [_lazy_zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        fits = device.type == "cpu" and cpu_multiplies_bf16_faster() and config.head_dim % 16 == 0
        self.by_kernel = fits and kernel_for(*self.keys) is not None
        """Whether `cpu_decode_attention` reads it."""
        self._owners: list[Sequence] = []
        self._filled: list[int] = []

    def arrange(self, sequences: Listing[Sequence], cache: PagedCache) -> list[Sequence]:
        """Give each sequence a row that holds its computed tokens; the sequences in the order of the rows.

        Whoever has a row among the first keeps it, so that in most steps nothing is copied.
        """
        count, wanted = len(sequences), set(sequences)
        stay = [owner if owner in wanted else None for owner in self._owners[:count]]
        stay += [None] * (count - len(stay))
        staying = set(stay)
        new = (sequence for sequence in sequences if sequence not in staying)
        rows = [next(new) if owner is None else owner for owner in stay]
        missing = []
        for row, sequence in enumerate(rows):
            known = row < len(self._owners) and self._owners[row] is sequence
            if not known or self._filled[row] != sequence.computed:
                missing.append(row)
        if missing:
            self._gather(missing, [rows[row] for row in missing], cache)
        self._owners = rows
        self._filled = [sequence.computed + 1 for sequence in rows]  # with the step to come
        return rows

    def clear(self) -> None:
        """Forget all rows: the weights that made them are gone."""
        self._owners, self._filled = [], []

    def _gather(self, rows: Listing[int], sequences: Listing[Sequence], cache: PagedCache) -> None:
        """Copy the sequences' computed tokens into these rows, all at once: answers mostly begin many together."""
        device = self.keys[0].device
        slots = [cache.slots(sequence, 0, sequence.computed) for sequence in sequences]
        places = [row * self.length + np.arange(len(of_row)) for row, of_row in zip(rows, slots, strict=True)]
        slots_N, places_N = (to_device(torch.from_numpy(np.concatenate(x)), device) for x in (slots, places))
        for layer, stores in enumerate(zip(self.keys, self.values, strict=True)):
            for store, found_NKd in zip(stores, cache.read(layer, slots_N), strict=True):
                store.flatten(0, 1).index_copy_(0, places_N, found_NKd)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed pages, which exist once they are touched; torch.zeros touches them all.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
