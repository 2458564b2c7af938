"""The attentions that fill and read the cache, through the model's `Attention` seam."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Sequence as Listing
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minnow.engine.cache import PagedCache, Window
from minnow.engine.scheduler import Chunk
from minnow.model.attention import PackedAttention, flash_attention
from minnow.model.cpu_attention import cpu_decode_attention
from minnow.transfer import to_device


class DecodeAttention:
    """One new token for each of the window's first B rows; row b attends to its earlier tokens and itself.

    positions_B: the new tokens' places, which are the lengths of what came before. slots_B: where they stand in
    the blocks. mask_B11T: added to the scores of the rows' first T places, 0 or -inf. Made of tensors only, so
    that a whole decode step can be compiled.
    """

    def __init__(self, cache: PagedCache, window: Window, positions_B: Tensor, slots_B: Tensor, mask_B11T: Tensor):
        self._cache, self._window = cache, window
        self._rows_B = torch.arange(positions_B.shape[0], device=positions_B.device)
        self._positions_B, self._slots_B, self._mask_B11T = positions_B, slots_B, mask_B11T

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """T is 1."""
        rows, reach = q_BTHd.shape[0], self._mask_B11T.shape[3]
        k_BKd, v_BKd = k_BTKd[:, 0], v_BTKd[:, 0]
        self._cache.write(layer, self._slots_B, k_BKd, v_BKd)
        keys, values = self._window.keys[layer], self._window.values[layer]
        keys[self._rows_B, self._positions_B] = k_BKd
        values[self._rows_B, self._positions_B] = v_BKd
        if self._window.by_kernel and rows > 1:  # calling it costs more than torch's attention for one row
            return cpu_decode_attention(q_BTHd[:, 0], keys, values, self._positions_B)[:, None]
        k_BKTd, v_BKTd = keys[:rows, :reach].transpose(1, 2), values[:rows, :reach].transpose(1, 2)
        # The G query heads that share a key head stand as G queries of that head: no key is repeated.
        q_BKGd = q_BTHd.view(rows, k_BKTd.shape[1], -1, q_BTHd.shape[-1])
        out_BKGd = F.scaled_dot_product_attention(q_BKGd, k_BKTd, v_BKTd, attn_mask=self._mask_B11T)
        return out_BKGd.reshape(q_BTHd.shape)


class MixedAttention:
    """Decoding rows, whole prompts and later pieces of prompts, one after another in one row of tokens.

    Decoding rows come first and read the window; whole prompts attend among themselves as packed documents do;
    a later piece gathers its past from the blocks.
    """

    def __init__(
        self,
        cache: PagedCache,
        decode: DecodeAttention | None,
        rows: int,
        chunks: Listing[Chunk],
        slots_N: Tensor,
    ):
        """chunks: behind the `rows` decoding ones; those that start at 0 first. slots_N: of their tokens."""
        self._cache, self._decode, self._rows, self._slots_N = cache, decode, rows, slots_N
        device = slots_N.device
        whole = [chunk.count for chunk in chunks if chunk.start == 0]
        self._whole_end = rows + sum(whole)
        self._whole = PackedAttention(torch.tensor([0, *whole]).cumsum(0).to(torch.int32), device) if whole else None
        self._later = _LaterPieces(cache, chunks[len(whole) :], device) if len(whole) < len(chunks) else None

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """B is 1 and T all tokens of the step."""
        q, k, v = q_BTHd[0], k_BTKd[0], v_BTKd[0]
        rows, whole_end = self._rows, self._whole_end
        self._cache.write(layer, self._slots_N, k[rows:], v[rows:])
        out = []
        if self._decode is not None:
            out.append(self._decode(layer, q[:rows, None], k[:rows, None], v[:rows, None])[:, 0])
        if self._whole is not None:
            out.append(self._whole(layer, *(x[None, rows:whole_end] for x in (q, k, v)))[0])
        if self._later is not None:
            out.append(self._later(layer, q[whole_end:]))
        return torch.cat(out)[None]


class _LaterPieces:
    """Attention of later pieces of prompts to everything before them and to themselves, all of it in the blocks."""

    def __init__(self, cache: PagedCache, chunks: Listing[Chunk], device: torch.device):
        self._cache = cache
        self._counts = [chunk.count for chunk in chunks]
        self._ends = [chunk.start + chunk.count for chunk in chunks]
        slots = [cache.slots(chunk.sequence, 0, end) for chunk, end in zip(chunks, self._ends, strict=True)]
        self._slots_N = to_device(torch.from_numpy(np.concatenate(slots)), device)

    @cached_property
    def _borders(self) -> list[Tensor]:
        """Of the queries and of the keys, one piece after another: what flash attention asks for."""
        borders = (torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (self._counts, self._ends))
        return [to_device(border, self._slots_N.device) for border in borders]

    @cached_property
    def _masks(self) -> list[Tensor]:
        """Of each piece, bool [its tokens, those up to its end]: where a query sees a key."""
        places_T = torch.arange(max(self._ends), device=self._slots_N.device)
        return [
            places_T[:end] <= places_T[end - count : end, None]
            for count, end in zip(self._counts, self._ends, strict=True)
        ]

    def __call__(self, layer: int, q_NHd: Tensor) -> Tensor:
        keys, values = self._cache.read(layer, self._slots_N)
        flash = flash_attention(q_NHd.device, q_NHd.dtype, q_NHd.shape[-1])
        if flash is not None:  # a causal one aligns the last query with the last key
            return flash(q_NHd, keys, values, *self._borders, max(self._counts), max(self._ends))
        pieces = zip(q_NHd.split(self._counts), keys.split(self._ends), values.split(self._ends), strict=True)
        out = []
        for piece, mask_QT in zip(pieces, self._masks, strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in piece)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_QT, enable_gqa=q.shape[1] != k.shape[1])
            out.append(attended[0].transpose(0, 1))
        return torch.cat(out)


VARLEN_BLOCK_SIZE = 256
"""Flash attention reads blocks of a multiple of this many tokens."""


def varlen_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Tensor] | None:
    """torch's flash attention over variable lengths where it is here and reads blocks (not yet in torch 2.11)."""
    attend = flash_attention(device, dtype, head_dim)
    return attend if attend is not None and "block_table" in inspect.signature(attend).parameters else None


class VarlenAttention:
    """All chunks of a step in one kernel that reads the blocks where they lie (CUDA, half precision).

    attend: causal, so that a row's last query sees all of it. Row s has queries cu_queries[s] to cu_queries[s + 1], the
    last of its lengths[s] tokens; its blocks are block_table[s].
    """

    def __init__(
        self,
        attend: Callable[..., Tensor],
        cache: PagedCache,
        slots_N: Tensor,
        cu_queries: Tensor,
        cu_lengths: Tensor,
        lengths_S: Tensor,
        block_table: Tensor,
        max_queries: int,
        max_length: int,
    ):
        self._attend, self._cache, self._slots_N = attend, cache, slots_N
        self._cu_queries, self._cu_lengths, self._lengths_S = cu_queries, cu_lengths, lengths_S
        self._block_table = block_table
        self._max_queries, self._max_length = max_queries, max_length

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """B * T are the step's tokens."""
        q, k, v = q_BTHd.flatten(0, 1), k_BTKd.flatten(0, 1), v_BTKd.flatten(0, 1)
        self._cache.write(layer, self._slots_N, k, v)
        out = self._attend(
            q,
            self._cache.keys[layer],
            self._cache.values[layer],
            self._cu_queries,
            self._cu_lengths,
            self._max_queries,
            self._max_length,
            seqused_k=self._lengths_S,
            block_table=self._block_table,
        )
        return out.view(q_BTHd.shape)
