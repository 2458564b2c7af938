"""The decoder as ONNX sees it: plain tensors in and out, the KV cache among them.

The model's own forward pass runs behind its attention seam; nothing of it is written twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minnow.model.transformer import CausalLM


class OnnxDecoder(nn.Module):
    """One step of decoding, of any length: T new tokens behind P cached ones.

    The names and layouts are those of Optimum and transformers.js, so that their generation loops work.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """input_ids and position_ids int64 [B, T], attention_mask int64 [B, P + T] (0: padding, to the left).

        past: keys and values fp32 [B, K, P, d] of each layer, P may be 0. Returns logits fp32 [B, T, V], and the keys
        and values of P + T tokens.
        """
        attention = _AppendingAttention(past, _mask(attention_mask, input_ids.shape[1]))
        # How long a sequence may be is for the caller to know: a graph has no place for an error message.
        hidden_BTD = self.model(input_ids, position_ids, attention, allow_beyond_trained_length=True)
        return self.model.logits(hidden_BTD), attention.present

    def input_names(self) -> list[str]:
        """Names of the graph's inputs, in order."""
        return ["input_ids", "attention_mask", "position_ids", *self._cache_names("past_key_values")]

    def output_names(self) -> list[str]:
        """Names of the graph's outputs, in order."""
        return ["logits", *self._cache_names("present")]

    def _cache_names(self, prefix: str) -> list[str]:
        layers = self.model.config.num_hidden_layers
        return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _mask(attention_mask: Tensor, new: int) -> Tensor:
    """bool [B, 1, 1, T, P + T]: whether token t of the new ones sees token s.

    Padding sees itself: a softmax over nothing is NaN, and NaN in a cached value would reach every later token even
    with weight 0.
    """
    total = attention_mask.shape[1]
    places_S = torch.arange(total)
    places_T1 = (places_S[total - new :]).unsqueeze(1)
    seen_BTS = (places_S <= places_T1) & (attention_mask != 0).unsqueeze(1) | (places_S == places_T1)
    return seen_BTS[:, None, None]


class _AppendingAttention:
    """Attention over the cached tokens and the new ones, in plain matrix products that every ONNX runtime has."""

    def __init__(self, past: list[tuple[Tensor, Tensor]], mask_B11TS: Tensor) -> None:
        self._past = past
        self._mask_B11TS = mask_B11TS
        self.present: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Attend, and keep what the next step needs."""
        past_k, past_v = self._past[layer]
        k_BKSd = torch.cat((past_k, k_BTKd.transpose(1, 2)), dim=2)
        v_BKSd = torch.cat((past_v, v_BTKd.transpose(1, 2)), dim=2)
        self.present.append((k_BKSd, v_BKSd))
        # The query heads that share a key head stand beside each other: [B, K, G, T, d].
        q_BKGTd = q_BTHd.transpose(1, 2).unflatten(1, (k_BTKd.shape[2], -1))
        scores = q_BKGTd @ k_BKSd.unsqueeze(2).transpose(-1, -2) * q_BTHd.shape[-1] ** -0.5
        scores = scores.masked_fill(~self._mask_B11TS, float("-inf"))
        out_BKGTd = scores.softmax(-1) @ v_BKSd.unsqueeze(2)
        return out_BKGTd.flatten(1, 2).transpose(1, 2)
