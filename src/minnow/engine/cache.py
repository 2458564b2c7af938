"""The KV cache, and the two attentions that fill and read it through the model's `Attention` seam."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minnow.model.attention import PackedAttention
from minnow.model.config import ModelConfig


class KVCache:
    """Keys and values of up to `slots` sequences of up to `length` tokens: [layers, slots, K, length, d] each.

    It starts as zeros, not as raw memory: places that a row has not filled are barred from its attention,
    but a weight of 0 times a chance NaN would still be NaN.
    """

    def __init__(self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, length, config.head_dim)
        self.slots = slots
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """Memory that one token of one sequence takes."""
        width = config.num_key_value_heads * config.head_dim
        return 2 * config.num_hidden_layers * width * dtype.itemsize

    def write(self, layer: int, slots_N: Tensor, positions_N: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> None:
        """Put token n's key and value at (slot n, position n)."""
        self.keys[layer][slots_N, :, positions_N] = k_NKd
        self.values[layer][slots_N, :, positions_N] = v_NKd

    def copy(self, source: int, target: int, length: int) -> None:
        """Make slot `target` hold the first `length` tokens of slot `source`."""
        for store in (self.keys, self.values):
            store[:, target, :, :length] = store[:, source, :, :length]


class PrefillAttention:
    """Whole prompts, one after another in one packed row: each attends within itself and is stored in its
    slot."""

    def __init__(self, cache: KVCache, slots: list[int], lengths: list[int], positions_N: Tensor):
        self._cache = cache
        self._positions_N = positions_N
        device = positions_N.device
        repeats = torch.tensor(lengths, device=device)
        self._slots_N = torch.tensor(slots, device=device).repeat_interleave(repeats)
        borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        self._attend = PackedAttention(borders, device)

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """B is 1 and T all prompts' tokens."""
        self._cache.write(layer, self._slots_N, self._positions_N, k_BTKd[0], v_BTKd[0])
        return self._attend(layer, q_BTHd, k_BTKd, v_BTKd)


class DecodeAttention:
    """One new token for each of the first B slots; row b already holds lengths[b] tokens and attends to
    those and itself."""

    def __init__(self, cache: KVCache, lengths: list[int], lengths_B: Tensor):
        self._cache = cache
        self._rows = len(lengths)
        self._reach = max(lengths) + 1
        self._slots_B = torch.arange(self._rows, device=lengths_B.device)
        self._lengths_B = lengths_B
        # True = may look. Every row may look at itself at least, so no row's softmax is over nothing.
        self._mask_B11T = None
        if min(lengths) != max(lengths):
            places_T = torch.arange(self._reach, device=lengths_B.device)
            self._mask_B11T = (places_T <= lengths_B[:, None])[:, None, None]

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """T is 1."""
        self._cache.write(layer, self._slots_B, self._lengths_B, k_BTKd[:, 0], v_BTKd[:, 0])
        k_BKTd = self._cache.keys[layer, : self._rows, :, : self._reach]
        v_BKTd = self._cache.values[layer, : self._rows, :, : self._reach]
        # The G query heads that share a key head stand as G queries of that head: no key is repeated.
        q_BKGd = q_BTHd.view(self._rows, k_BKTd.shape[1], -1, q_BTHd.shape[-1])
        out_BKGd = F.scaled_dot_product_attention(q_BKGd, k_BKTd, v_BKTd, attn_mask=self._mask_B11T)
        return out_BKGd.reshape(q_BTHd.shape)
