# ruff: noqa: N815 (fields carry their shape)
"""The decoder: embedding, layers, final norm, head; its modules bear transformers' names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minnow.model.attention import Attention
from minnow.model.checkpointing import GradientCheckpointing, checkpointed
from minnow.model.config import ModelConfig
from minnow.model.init import InitConfig, initialize
from minnow.model.int8 import from_int8, int8_linear
from minnow.model.moe import Decisions, MoE, Routing
from minnow.model.norm import RMSNorm
from minnow.model.rope import rotary_tables, rotate
from minnow.model.tall_linear import pays, tall_linear

if TYPE_CHECKING:
    from minnow.model.lora import Adapter

QKV = tuple[Tensor, Tensor, Tensor]


class ImageEmbeddings(NamedTuple):
    """What stands in the places of image tokens instead of their embedding."""

    places_M: Tensor
    """int64 [M]: places in the flattened batch, each once."""
    embeddings_MD: Tensor
    """[M, D], in the model's compute dtype."""

    def put_into(self, x_BTD: Tensor) -> Tensor:
        """x [B, T, D] -> the same, with the embeddings in their places."""
        return x_BTD.flatten(0, 1).index_copy(0, self.places_M, self.embeddings_MD).view_as(x_BTD)


class Linear(nn.Linear):
    """Computes in its input's dtype: the master weight may be fp32 while the residual stream is bf16.

    weight_scale: None, or fp32 [out] where quantize.py has made the weight int8.
    """

    weight_scale: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **factory: Any) -> None:
        super().__init__(in_features, out_features, bias=bias, **factory)
        self.register_parameter("weight_scale", None)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: `initialize` draws all weights at once."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.weight_scale is None and not pays(x, self.weight):
            return F.linear(x, self.weight.to(x.dtype), bias)
        y = self.product(x) if self.weight_scale is not None else tall_linear(x, self.weight.to(x.dtype))
        return y if bias is None else y + bias

    def product(self, x: Tensor) -> Tensor:
        """W x without the bias."""
        if self.weight_scale is None:
            return F.linear(x, self.weight.to(x.dtype))
        return int8_linear(x, self.weight, self.weight_scale)

    def matrix(self) -> Tensor:
        """W in fp32."""
        return self.weight.float() if self.weight_scale is None else from_int8(self.weight, self.weight_scale)

    def share(self, linear: Linear) -> None:
        """Take over the weights of another layer of the same shape: the same tensors, not copies."""
        self.weight, self.bias, self.weight_scale = linear.weight, linear.bias, linear.weight_scale


class Embedding(nn.Embedding):
    """An embedding whose weights `initialize` draws."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class SelfAttention(nn.Module):
    """The projections around attention (2305.13245); attention itself is given by the caller, see
    attention.py."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, width, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> QKV:
        """Queries [B, T, H, d], keys and values [B, T, K, d]; queries and keys normalised and turned."""
        q_BTHd = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKd = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKd = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHd, k_BTKd = self.q_norm(q_BTHd), self.k_norm(k_BTKd)
        return rotate(q_BTHd, cos, sin), rotate(k_BTKd, cos, sin), v_BTKd


class MLP(nn.Module):
    """SwiGLU (2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        bias = config.mlp_bias
        self.gate_proj = Linear(config.hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(config.hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class DecoderLayer(nn.Module):
    """One layer, as the two parts around attention: each is a pure function that torch.compile can take."""

    mlp: MLP | MoE

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn = SelfAttention(config)
        if config.is_sparse(index):
            self.mlp = _moe(config)
        else:
            self.mlp = MLP(config, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        attend: Callable[..., Tensor],
        cos: Tensor,
        sin: Tensor,
        parts: _Parts,
        routing: Routing | None,
        experts_mode: GradientCheckpointing,
    ) -> tuple[Tensor, Decisions | None]:
        """x [B, T, D] -> the same, and what the router decided, if there is one. `attend` takes (q, k, v).

        experts_mode: what is kept of the experts alone for the backward pass.
        """
        attended_BTHd = attend(*parts.before_attention(self, x_BTD, cos, sin))
        if not isinstance(self.mlp, MoE):
            return parts.after_attention(self, x_BTD, attended_BTHd), None
        x_BTD, normed_BTD = parts.before_experts(self, x_BTD, attended_BTHd)
        routed_BTD, decisions = checkpointed(experts_mode, self.mlp, normed_BTD, self.index, routing)
        return x_BTD + routed_BTD, decisions


def _moe(config: ModelConfig) -> MoE:
    assert config.experts is not None
    shared = config.experts.n_shared_experts
    shared_experts = MLP(config, shared * config.experts.moe_intermediate_size) if shared else None
    return MoE(config.hidden_size, config.experts, shared_experts)


def before_attention(layer: DecoderLayer, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> QKV:
    """Norm and projections of one layer: what its attention works on."""
    return layer.self_attn.project(layer.input_layernorm(x_BTD), cos, sin)


def after_attention(layer: DecoderLayer, x_BTD: Tensor, attended_BTHd: Tensor) -> Tensor:
    """Output projection and MLP of one layer, each added to the residual stream `x`."""
    x_BTD = x_BTD + layer.self_attn.o_proj(attended_BTHd.flatten(-2))
    return x_BTD + layer.mlp(layer.post_attention_layernorm(x_BTD))


def before_experts(layer: DecoderLayer, x_BTD: Tensor, attended_BTHd: Tensor) -> tuple[Tensor, Tensor]:
    """The same in a layer with routed experts, without their part: the stream so far, and what they work on."""
    x_BTD = x_BTD + layer.self_attn.o_proj(attended_BTHd.flatten(-2))
    normed_BTD = layer.post_attention_layernorm(x_BTD)
    shared_experts = cast(MoE, layer.mlp).shared_experts
    return (x_BTD if shared_experts is None else x_BTD + shared_experts(normed_BTD)), normed_BTD


def last_norm(backbone: Backbone, x_BTD: Tensor) -> Tensor:
    """The norm after the layers: hidden states."""
    normed_BTD: Tensor = backbone.norm(x_BTD)
    return normed_BTD


class _Parts(NamedTuple):
    """The functions of a layer around its attention and experts, and the last norm, as they are or compiled."""

    before_attention: Callable[..., QKV]
    after_attention: Callable[..., Tensor]
    before_experts: Callable[..., tuple[Tensor, Tensor]]
    last_norm: Callable[..., Tensor]


_PLAIN_PARTS = _Parts(before_attention, after_attention, before_experts, last_norm)


class Backbone(nn.Module):
    """Embedding, layers and final norm (transformers' `model.*`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A decoder. `forward` gives hidden states, `logits` the head: a loss may go over the head in
    chunks.

    compute_dtype: dtype of the residual stream and of all products; the parameters keep their own (fp32
    masters). gradient_checkpointing: what of each layer is kept for the backward pass, see checkpointing.py.
    adapter: what `add_lora` put beside its linear layers; only that is trained and saved then. routing: set
    by the training loop around a micro-batch's forward passes, for a model with experts. generation_config: what the
    file of that name said of a loaded model, kept for when it is saved.
    """

    def __init__(self, config: ModelConfig, init: InitConfig | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compute_dtype = torch.float32
        self.gradient_checkpointing: GradientCheckpointing = "off"
        self.adapter: Adapter | None = None
        self.routing: Routing | None = None
        self.generation_config: dict[str, Any] = {}
        self._compiled: _Parts | None = None
        initialize(self, init or InitConfig(), seed)

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D]: the embedding when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which the files of a loaded model say that it ends; none of a new one."""
        eos = self.generation_config.get("eos_token_id")
        return eos if isinstance(eos, list) else [] if eos is None else [eos]

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attention: Attention,
        *,
        allow_beyond_trained_length: bool = False,
        images: ImageEmbeddings | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, in compute_dtype.

        positions_BT (int64) are places within the document, always given: a cached decoder that left them
        out would turn every new token as if it stood at place 0. `attention` decides who sees whom.
        UserError when a position lies beyond max_position_embeddings (looked at on the CPU only, where it
        costs no synchronisation, and not while compiling), unless `allow_beyond_trained_length`: an examination of
        just that. `images` stand in the places of their tokens.
        """
        if tokens_BT.shape != positions_BT.shape:
            raise ValueError(f"tokens {tuple(tokens_BT.shape)} and positions {tuple(positions_BT.shape)} differ")
        looks = positions_BT.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and positions_BT.numel() and not allow_beyond_trained_length:
            self.config.check_sequence_length(int(positions_BT.max()) + 1)
        config = self.config
        cos, sin = rotary_tables(positions_BT, config.head_dim, config.rope_theta, config.rope_scaling)
        x_BTD = self.model.embed_tokens(tokens_BT).to(self.compute_dtype)
        if images is not None:
            x_BTD = images.put_into(x_BTD)
        # Compiled parts serve training: generation and evaluation come in too many shapes to compile for.
        parts = self._compiled if self._compiled and torch.is_grad_enabled() else _PLAIN_PARTS
        # Taken now: when checkpointing runs a layer again, in the backward pass, the training loop has put it away.
        routing = self.routing

        def run_layer(index: int, x: Tensor) -> tuple[Tensor, Decisions | None]:
            return self.model.layers[index](x, partial(attention, index), cos, sin, parts, routing, experts_mode)

        mode = self.gradient_checkpointing if torch.is_grad_enabled() else "off"
        experts_mode: GradientCheckpointing = "off"
        if mode == "selective" and self._compiled:
            # The compiler chooses so by itself: compiled parts keep products and recompute the rest. Experts are not
            # among them.
            mode, experts_mode = "off", "selective"
        for index in range(config.num_hidden_layers):
            x_BTD, decisions = checkpointed(mode, run_layer, index, x_BTD)
            if routing is not None and decisions is not None:
                routing.decisions.append((index, decisions))
        return parts.last_norm(self.model, x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token: hidden [..., D] -> fp32 [..., V]."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype)).float()

    @property
    def is_compiled(self) -> bool:
        """Whether training runs compiled parts."""
        return self._compiled is not None

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Leave the compiled parts aside for the length of the block."""
        compiled, self._compiled = self._compiled, None
        try:
            yield
        finally:
            self._compiled = compiled

    def compile_backbone(self) -> None:
        """Compile the parts around attention, once for all layers; used wherever gradients are recorded."""
        self._compiled = _Parts._make(map(torch.compile, _PLAIN_PARTS))
