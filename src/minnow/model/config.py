"""The shape of a decoder, in Hugging Face's field names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minnow.config import UserError
from minnow.model.experts_config import ExpertsConfig


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies are stretched so that a model reads texts longer than it was trained on."""

    type: Literal["linear", "yarn", "llama3"]
    """linear: positions divided by `factor` (2306.15595); yarn: only the slow frequencies are (2309.00071);
    llama3: as Llama 3.1 does it."""
    factor: float
    """New length over trained length."""
    original_max_position_embeddings: int
    """Sequence length the model was trained on, in tokens."""
    beta_fast: float = 32.0
    """yarn: frequencies that turn more often than this within the trained length stay as they are."""
    beta_slow: float = 1.0
    """yarn: frequencies that turn less often than this are divided by `factor`."""
    attention_factor: float = 1.0
    """yarn: cosines and sines are multiplied by this. Always written: readers else use 0.1 ln(factor) + 1."""
    low_freq_factor: float = 1.0
    """llama3: frequencies that turn less often than this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: frequencies that turn more often than this stay as they are."""

    def __post_init__(self) -> None:
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise UserError(f"rope_scaling.{name} is {getattr(self, name)}: it must be above 0")
        if not self.factor >= 1.0:
            raise UserError(f"rope_scaling.factor is {self.factor}: it is new length / trained length")
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"rope_scaling.high_freq_factor ({self.high_freq_factor}) must be greater than "
                f"low_freq_factor ({self.low_freq_factor})"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU; the names are Hugging Face's."""

    vocab_size: int = 6400
    """Rows of the embedding: the tokenizer's vocabulary, special and reserved tokens included."""
    hidden_size: int = 512
    """Width of the residual stream."""
    intermediate_size: int = 1408
    """Width of the SwiGLU MLP (with experts: of the layers that keep one)."""
    num_hidden_layers: int = 8
    """Number of decoder layers."""
    num_attention_heads: int = 8
    """Number of query heads."""
    num_key_value_heads: int = 2
    """Number of key/value heads; divides num_attention_heads (equal to it: plain multi-head attention)."""
    head_dim: int = 64
    """Width of one head; even. Need not be hidden_size / num_attention_heads."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Stretches the rotary frequencies beyond the trained length; none by default."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the output head too."""
    qk_norm: bool = True
    """RMSNorm on each query and key head before RoPE (Qwen3)."""
    attention_bias: bool = False
    """Biases on the q, k and v projections (Qwen2)."""
    attention_output_bias: bool = False
    """A bias on o_proj too (what attention_bias means to Llama and Qwen3); asks for attention_bias."""
    mlp_bias: bool = False
    """Biases on the MLP's projections (Llama only)."""
    max_position_embeddings: int = 1024
    """Longest sequence the model is trained on, in tokens; longer ones are refused."""
    experts: ExpertsConfig | None = None
    """Routed experts in the place of the MLP; none by default (a dense model)."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_key_value_heads ({self.num_key_value_heads}) must divide "
                f"model.num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}: RoPE turns pairs, so it must be even")
        if self.rope_theta <= 0 or self.rms_norm_eps <= 0:
            raise UserError("model.rope_theta and model.rms_norm_eps must be positive")
        if self.experts is not None:
            self._check_experts(self.experts)
            return
        self._check_biases()
        if not self.qk_norm and self.hidden_size % self.num_attention_heads:
            # transformers' LlamaConfig asks for this even when head_dim is given.
            raise UserError(
                f"model.hidden_size ({self.hidden_size}) must be a multiple of model.num_attention_heads "
                f"({self.num_attention_heads}) in a model without qk_norm (a Llama or Qwen2 checkpoint)"
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether layer number `layer` has routed experts."""
        return self.experts is not None and layer >= self.experts.first_k_dense_replace

    def _check_experts(self, experts: ExpertsConfig) -> None:
        if experts.first_k_dense_replace >= self.num_hidden_layers:
            raise UserError(
                f"model.experts.first_k_dense_replace ({experts.first_k_dense_replace}) leaves none of the "
                f"{self.num_hidden_layers} layers to the experts"
            )
        if self.mlp_bias:
            raise UserError("model.mlp_bias exists in LlamaForCausalLM only: switch it off in a model with experts")
        if experts.scoring == "sigmoid" and self.attention_output_bias:
            raise UserError("model.attention_output_bias is not in Glm4MoeForCausalLM (experts.scoring sigmoid)")
        if experts.scoring == "softmax" and not self.qk_norm:
            raise UserError("model.experts with scoring softmax needs model.qk_norm: Qwen3MoeForCausalLM has it")
        if experts.scoring == "softmax" and self.attention_bias != self.attention_output_bias:
            raise UserError(
                "model.attention_bias and model.attention_output_bias go together with experts of scoring softmax: "
                "Qwen3MoeForCausalLM has all four or none"
            )

    def _check_biases(self) -> None:
        """Refuse what no Hugging Face class has: a model must be readable elsewhere."""
        if self.attention_output_bias and not self.attention_bias:
            raise UserError("model.attention_output_bias asks for model.attention_bias: no class has the one alone")
        is_qwen2 = self.attention_bias and not self.attention_output_bias
        if self.qk_norm and is_qwen2:
            raise UserError(
                "model.qk_norm with model.attention_bias has no Hugging Face class without "
                "model.attention_output_bias (Qwen3's attention_bias also puts one on o_proj)"
            )
        if self.mlp_bias and (self.qk_norm or is_qwen2):
            raise UserError(
                "model.mlp_bias exists in LlamaForCausalLM only: switch qk_norm off, and attention_bias off or "
                "attention_output_bias on"
            )
        if is_qwen2 and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise UserError(
                f"model.head_dim must be hidden_size / num_attention_heads "
                f"({self.hidden_size}/{self.num_attention_heads}) with attention_bias: Qwen2 has no head_dim"
            )

    def check_sequence_length(self, length: int) -> None:
        """Refuse a sequence longer than the model was trained (or scaled) for."""
        if length <= self.max_position_embeddings:
            return
        advice = (
            "shorten it, train with a longer sequence_length, or stretch the context (--rope-scaling yarn --factor 4)"
        )
        if self.rope_scaling is not None:  # it cannot be stretched twice
            advice = f"shorten it (rope_scaling {self.rope_scaling.type} by {self.rope_scaling.factor:g} is counted in)"
        raise UserError(
            f"a sequence of {length} tokens is longer than the model's max_position_embeddings "
            f"({self.max_position_embeddings}): {advice}"
        )

    def check_training_rows(self, sequence_length: int, *, whose: str = "the model") -> None:
        """Refuse rows to train on that are longer than what the model was trained (or scaled) for."""
        if sequence_length <= self.max_position_embeddings:
            return
        advice = ", or teach it longer texts first (minnow pretrain --init-from MODEL --rope-scaling yarn)"
        if self.rope_scaling is not None:  # it cannot be stretched twice
            advice = f" (rope_scaling {self.rope_scaling.type} by {self.rope_scaling.factor:g} is counted in)"
        raise UserError(
            f"--sequence-length {sequence_length}: {whose} reads at most {self.max_position_embeddings} tokens; "
            f"give {self.max_position_embeddings} or less{advice}"
        )
