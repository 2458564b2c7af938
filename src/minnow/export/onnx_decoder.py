"""The decoder as ONNX sees it: plain tensors in and out, the KV cache among them.

The model's own forward pass runs behind its attention seam; nothing of it is written twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minnow.model.moe import Experts, MoE
from minnow.model.rope import rotary_frequencies
from minnow.model.transformer import CausalLM


class OnnxDecoder(nn.Module):
    """One step of decoding, of any length: T new tokens behind P cached ones.

    The names and layouts are those of Optimum and transformers.js, so that their generation loops work.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model
        config = model.config
        # Made now: what a tracer makes are stand-ins without numbers, and this function remembers its results.
        rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, torch.device("cpu"))
        for layer in model.model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.experts = _EveryExpert(layer.mlp.experts)  # type: ignore[assignment]

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


class _EveryExpert(nn.Module):
    """Routed experts as a fixed graph: all work on every token, and those not chosen weigh 0.

    A graph cannot sort tokens by expert into products of sizes that depend on the data.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = experts.gate_proj, experts.up_proj, experts.down_proj

    def forward(self, x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """As `Experts.forward`."""
        weights_NE = x_ND.new_zeros(x_ND.shape[0], len(self.gate_proj)).scatter(1, experts_Nk, weights_Nk)
        gate_ENF, up_ENF = x_ND @ self.gate_proj.transpose(1, 2), x_ND @ self.up_proj.transpose(1, 2)
        out_END = (F.silu(gate_ENF) * up_ENF) @ self.down_proj.transpose(1, 2)
        return (out_END * weights_NE.T.unsqueeze(-1)).sum(0)
