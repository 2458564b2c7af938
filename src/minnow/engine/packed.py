"""A copy of a model to play with: fewer, larger products, nothing looked up, nothing that training needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minnow.model.attention import Attention
from minnow.model.config import ModelConfig
from minnow.model.int8 import int8_linear
from minnow.model.rope import rotary_tables, rotate
from minnow.model.transformer import MLP, CausalLM, DecoderLayer, ImageEmbeddings, Linear


def can_pack(model: CausalLM) -> bool:
    """Whether every layer is of plain products: what an adapter or experts changed is run as it is."""
    layers = [cast(DecoderLayer, layer) for layer in model.model.layers]
    return all(
        type(layer.mlp) is MLP and all(type(m) is Linear for m in (*_qkv(layer), layer.self_attn.o_proj, *_mlp(layer)))
        for layer in layers
    )


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """In fp32, returned in x's dtype."""
    return F.rms_norm(x_ND.float(), weight_D.shape, weight_D, eps).to(x_ND.dtype)


def swiglu(gate_up_NF: Tensor) -> Tensor:
    """silu(gate) * up, which stand side by side."""
    gate, up = gate_up_NF.chunk(2, dim=-1)
    return F.silu(gate) * up


class _BetweenProducts(NamedTuple):
    """What is done between the products, on N tokens: as it is or compiled."""

    rms_norm: Callable[..., Tensor]
    rotate: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]


_PLAIN = _BetweenProducts(rms_norm, rotate, swiglu)


def _for_any_number(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled once for any first dimension of its tensors but parameters, from 2 on; their other sizes are constants.

    Parameters come as tensors that are none: for each of them code of its own would be made.
    """
    compiled = torch.compile(function)

    def call(*arguments: Any) -> Tensor:
        given = []
        for argument in arguments:
            if isinstance(argument, nn.Parameter):
                given.append(argument.detach())
            elif isinstance(argument, Tensor):
                given.append(argument.contiguous())
                torch._dynamo.mark_dynamic(given[-1], 0)
            else:
                given.append(argument)
        return compiled(*given)

    return call


class PackedModel(nn.Module):
    """The same function as the model it was made from; where that one's weights change, `renew` takes them over.

    Everything is in `compute_dtype`; weights that need no change of form are shared with the model. Seven products
    a layer become four, which matters where a step is short: for one token of a 26M model, calling the products
    takes longer than they take.
    """

    def __init__(self, model: CausalLM):
        super().__init__()
        self.config = config = model.config
        self.compute_dtype = dtype = model.compute_dtype
        with torch.no_grad():
            self.embedding = _frozen(model.model.embed_tokens.weight, dtype)
            self.head_weight = self.embedding if model.lm_head is None else _frozen(model.lm_head.weight, dtype)
            self.norm = _frozen(model.model.norm.weight, torch.float32)
            self.layers = nn.ModuleList(_PackedLayer(cast(DecoderLayer, layer), dtype) for layer in model.model.layers)
            places_T = torch.arange(config.max_position_embeddings, device=self.head_weight.device)
            cos_T, sin_T = rotary_tables(places_T[None], config.head_dim, config.rope_theta, config.rope_scaling)
            self.cos_T: Tensor
            self.sin_T: Tensor
            self.register_buffer("cos_T", cos_T[0], persistent=False)
            self.register_buffer("sin_T", sin_T[0], persistent=False)
        self._between = _PLAIN

    def compile_between_products(self) -> None:
        """Compile what is done between the products. They stay calls of the library, which knows prompts of any
        length."""
        self._between = _BetweenProducts._make(map(_for_any_number, _PLAIN))

    @torch.no_grad()
    def renew(self, model: CausalLM) -> None:
        """Take over what changed in the model, in place: whoever reads this copy's tensors reads the new weights."""
        for mine, new in zip(self.parameters(), PackedModel(model).parameters(), strict=True):
            if mine.data_ptr() != new.data_ptr():  # else it is shared with the model
                mine.copy_(new)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attention: Attention,
        *,
        images: ImageEmbeddings | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, as `CausalLM.forward` gives them."""
        config = self.config
        # Traced for a compiled step, all of it becomes part of that; for a single token nothing is compiled apart.
        between = _PLAIN if torch.compiler.is_compiling() or tokens_BT.numel() == 1 else self._between
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        batch_shape = tokens_BT.shape
        cos, sin = self.cos_T[positions_BT], self.sin_T[positions_BT]
        x = F.embedding(tokens_BT, self.embedding)
        if images is not None:
            x = images.put_into(x)

        def rms(x: Tensor, weight: Tensor) -> Tensor:
            return between.rms_norm(x.flatten(0, -2), weight, config.rms_norm_eps).view(x.shape)

        def turned(x_BTHd: Tensor) -> Tensor:
            return between.rotate(x_BTHd.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1)).view(x_BTHd.shape)

        for index, module in enumerate(self.layers):
            layer = cast(_PackedLayer, module)
            qkv = layer.qkv(rms(x, layer.input_norm))
            q, k, v = qkv.unflatten(-1, (-1, config.head_dim)).split(heads, dim=-2)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = rms(q, layer.q_norm), rms(k, layer.k_norm)
            attended = attention(index, turned(q), turned(k), v)
            x = x + layer.out(attended.flatten(-2))
            gate_up = layer.gate_up(rms(x, layer.mlp_norm))
            x = x + layer.down(between.swiglu(gate_up.flatten(0, -2)).unflatten(0, batch_shape))
        return rms(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token: hidden [..., D] -> fp32 [..., V]."""
        return F.linear(hidden, self.head_weight).float()


def packed_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory of the packed copy of an fp32 model that computes in `dtype`, without what the two share."""
    with torch.device("meta"):
        parameters = CausalLM(config).named_parameters()
    joined = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    return sum(
        dtype.itemsize * parameter.numel()
        for name, parameter in parameters
        if name.split(".")[-2] in joined or (dtype != torch.float32 and "norm" not in name)
    )


class _PackedLayer(nn.Module):
    """Weights of one layer: q, k and v stand in one matrix, gate and up in another."""

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype):
        super().__init__()
        attention, mlp = layer.self_attn, cast(MLP, layer.mlp)
        self.input_norm = _frozen(layer.input_layernorm.weight, torch.float32)
        self.qkv = _PackedLinear(_qkv(layer), dtype)
        self.q_norm = None if attention.q_norm is None else _frozen(attention.q_norm.weight, torch.float32)
        self.k_norm = None if attention.k_norm is None else _frozen(attention.k_norm.weight, torch.float32)
        self.out = _PackedLinear([attention.o_proj], dtype)
        self.mlp_norm = _frozen(layer.post_attention_layernorm.weight, torch.float32)
        self.gate_up = _PackedLinear([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = _PackedLinear([mlp.down_proj], dtype)


class _PackedLinear(nn.Module):
    """Some linear layers of one input, their outputs side by side."""

    def __init__(self, linears: Sequence[Linear], dtype: torch.dtype):
        super().__init__()
        scales = [linear.weight_scale for linear in linears if linear.weight_scale is not None]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.weight = _frozen(_joined([linear.weight for linear in linears]), torch.int8 if scales else dtype)
        self.weight_scale = _frozen(_joined(scales), torch.float32) if scales else None
        self.bias = _frozen(_joined(biases), dtype) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_scale is None:
            return F.linear(x, self.weight, self.bias)
        y = int8_linear(x, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias


def _qkv(layer: DecoderLayer) -> tuple[Linear, ...]:
    return layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj


def _mlp(layer: DecoderLayer) -> tuple[Linear, ...]:
    mlp = cast(MLP, layer.mlp)
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _frozen(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A parameter and not a buffer: torch.compile takes a module's frozen parameters for constants."""
    return nn.Parameter(weight.detach().to(dtype), requires_grad=False)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor stays where it is, shared with the model."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
