"""A frozen copy of a model for serving: fewer, larger products, nothing looked up, nothing that training needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minnow.model.attention import Attention
from minnow.model.config import ModelConfig
from minnow.model.rope import rotary_tables, rotate
from minnow.model.transformer import MLP, CausalLM, DecoderLayer, Linear


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer: q, k and v stand in one matrix, gate and up in another."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def can_pack(model: CausalLM) -> bool:
    """Whether every layer is of plain products: adapters and experts are run as they are."""
    layers = [cast(DecoderLayer, layer) for layer in model.model.layers]
    return all(
        type(layer.mlp) is MLP
        and all(type(m) is Linear for m in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj))
        for layer in layers
    )


class PackedModel:
    """The same function as the model it was made from, as long as that one's weights do not change.

    Everything is in `compute_dtype`. Seven products a layer become four, which matters where a step is short:
    for one token of a 26M model the products take less time than calling them.
    """

    def __init__(self, model: CausalLM):
        config: ModelConfig = model.config
        self.config = config
        self.compute_dtype = dtype = model.compute_dtype
        with torch.no_grad():
            self.embedding = model.model.embed_tokens.weight.detach().to(dtype)
            self.head_weight = model.head_weight.detach().to(dtype)
            self.norm = model.model.norm.weight.detach().float()
            self._layers = [_pack(cast(DecoderLayer, layer), dtype) for layer in model.model.layers]
            places_T = torch.arange(config.max_position_embeddings, device=self.head_weight.device)
            cos, sin = rotary_tables(places_T[None], config.head_dim, config.rope_theta, config.rope_scaling)
            self._cos_Td, self._sin_Td = cos[0], sin[0]

    def __call__(self, tokens_BT: Tensor, positions_BT: Tensor, attention: Attention) -> Tensor:
        """Hidden states [B, T, D] after the final norm, as `CausalLM.forward` gives them."""
        config = self.config
        cos, sin = self._cos_Td[positions_BT], self._sin_Td[positions_BT]
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        x = F.embedding(tokens_BT, self.embedding)
        for index, layer in enumerate(self._layers):
            qkv = F.linear(self._rms(x, layer.input_norm), layer.qkv, layer.qkv_bias).unflatten(
                -1, (-1, config.head_dim)
            )
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=-2)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._rms(q, layer.q_norm), self._rms(k, layer.k_norm)
            attended = attention(index, rotate(q, cos, sin), rotate(k, cos, sin), v)
            x = x + F.linear(attended.flatten(-2), layer.out, layer.out_bias)
            gate, up = F.linear(self._rms(x, layer.mlp_norm), layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
        return self._rms(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token: hidden [..., D] -> fp32 [..., V]."""
        return F.linear(hidden, self.head_weight).float()

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight, self.config.rms_norm_eps).to(x.dtype)


def _pack(layer: DecoderLayer, dtype: torch.dtype) -> _Layer:
    attention, mlp = layer.self_attn, cast(MLP, layer.mlp)
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    return _Layer(
        input_norm=layer.input_layernorm.weight.float(),
        qkv=torch.cat([p.weight for p in qkv]).to(dtype),
        qkv_bias=_stack([p.bias for p in qkv], dtype),
        q_norm=None if attention.q_norm is None else attention.q_norm.weight.float(),
        k_norm=None if attention.k_norm is None else attention.k_norm.weight.float(),
        out=attention.o_proj.weight.to(dtype),
        out_bias=_stack([attention.o_proj.bias], dtype),
        mlp_norm=layer.post_attention_layernorm.weight.float(),
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).to(dtype),
        gate_up_bias=_stack([mlp.gate_proj.bias, mlp.up_proj.bias], dtype),
        down=mlp.down_proj.weight.to(dtype),
        down_bias=_stack([mlp.down_proj.bias], dtype),
    )


def _stack(parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """One under the other; None for biases that are not there."""
    there = [part for part in parts if part is not None]
    return torch.cat(there).to(dtype) if there else None
