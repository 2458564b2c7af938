"""A model's shape and weights in GGUF's names and layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import gguf
import torch
from torch import Tensor

from minnow.config import UserError
from minnow.model.config import ModelConfig, RopeScaling
from minnow.model.experts_config import ExpertsConfig
from minnow.model.hf_config import architecture
from minnow.model.rope import rotary_frequencies
from minnow.model.transformer import CausalLM

ARCHITECTURES: dict[str, gguf.MODEL_ARCH] = {
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
    "Glm4MoeForCausalLM": gguf.MODEL_ARCH.GLM4_MOE,
}
"""transformers' class -> llama.cpp's architecture."""


def gguf_architecture(config: ModelConfig) -> gguf.MODEL_ARCH:
    """llama.cpp's architecture that computes what `config` says. UserError where it has none."""
    arch = ARCHITECTURES[architecture(config)]
    if arch == gguf.MODEL_ARCH.QWEN3MOE and _beyond_qwen3moe(config):
        arch = gguf.MODEL_ARCH.GLM4_MOE
    if arch != gguf.MODEL_ARCH.LLAMA and config.attention_output_bias:
        raise UserError("llama.cpp's Qwen3 has no bias on o_proj: this model has one (attention_output_bias)")
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "yarn" and (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
        raise UserError("llama.cpp reads YaRN's beta_fast and beta_slow as 32 and 1: the model has others")
    if scaling is not None and scaling.type == "llama3" and arch != gguf.MODEL_ARCH.LLAMA:
        raise UserError("llama.cpp knows Llama 3's rope scaling for Llama models only (this one is not)")
    return arch


def add_shape(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Write the hyperparameters."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        _add_rope_scaling(writer, config.rope_scaling)
    if config.experts is not None:
        _add_experts(writer, config.experts)


def _beyond_qwen3moe(config: ModelConfig) -> bool:
    """Whether a Qwen3-MoE does what llama.cpp's does not: dense first layers, or weights that need not sum to 1.

    llama.cpp's GLM-4-MoE can do both, with the softmax as its router and a shared expert that adds nothing.
    """
    experts = config.experts
    return experts is not None and (experts.first_k_dense_replace > 0 or not experts.norm_topk_prob)


def _add_experts(writer: gguf.GGUFWriter, experts: ExpertsConfig) -> None:
    softmax = experts.scoring == "softmax"
    writer.add_expert_count(experts.num_experts)
    writer.add_expert_used_count(experts.num_experts_per_tok)
    writer.add_expert_feed_forward_length(experts.moe_intermediate_size)
    writer.add_expert_shared_count(max(1, experts.n_shared_experts))
    writer.add_leading_dense_block_count(experts.first_k_dense_replace)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX if softmax else gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(bool(experts.norm_topk_prob))
    writer.add_expert_weights_scale(experts.routed_scaling_factor)
    if experts.n_group > 1:
        writer.add_expert_group_count(experts.n_group)
        writer.add_expert_group_used_count(experts.topk_group)


def _add_rope_scaling(writer: gguf.GGUFWriter, scaling: RopeScaling) -> None:
    if scaling.type == "llama3":
        return  # stands in a tensor, see `gguf_tensors`
    kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
    writer.add_rope_scaling_type(kinds[scaling.type])
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    if scaling.type == "yarn":
        # llama.cpp multiplies cosines and sines by 0.1 ln(factor) + 1 itself; this one comes on top.
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1.0))


def gguf_tensors(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """(GGUF name, tensor as stored) of every weight of the language model; a linear layer's matrix stays [out, in]."""
    config = model.config
    arch = gguf_architecture(config)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if not name.startswith(("model.", "lm_head.")):  # tower and projector: see gguf_mmproj.py
            continue
        # Stacked experts are bare parameters; the selection bias is called as a bias of the router.
        written = name.replace("e_score_correction_bias", "e_score_correction.bias")
        stem, _, kind = (name, "", "weight") if names.get_name(name) else written.rpartition(".")
        renamed = names.get_name(stem)
        assert renamed is not None, name
        layer = stem.rpartition(".")[2]
        if arch == gguf.MODEL_ARCH.LLAMA and layer in heads:
            tensor = _interleave(tensor, heads[layer])
        yield f"{renamed}.{kind}", tensor
    if config.experts is not None and arch != ARCHITECTURES[architecture(config)]:
        yield from _neutral_parts(config, config.experts)
    if config.rope_scaling is not None and config.rope_scaling.type == "llama3":
        shape = (config.head_dim, config.rope_theta)
        cpu = torch.device("cpu")
        plain, scaled = (rotary_frequencies(*shape, scaling, cpu) for scaling in (None, config.rope_scaling))
        yield "rope_freqs.weight", plain / scaled


def _neutral_parts(config: ModelConfig, experts: ExpertsConfig) -> Iterator[tuple[str, Tensor]]:
    """What llama.cpp's GLM-4-MoE has and a Qwen3-MoE has not, so that it does nothing: zeros."""
    wide, narrow = config.hidden_size, experts.moe_intermediate_size
    for layer in range(experts.first_k_dense_replace, config.num_hidden_layers):
        yield f"blk.{layer}.exp_probs_b.bias", torch.zeros(experts.num_experts)
        yield f"blk.{layer}.ffn_gate_shexp.weight", torch.zeros(narrow, wide)
        yield f"blk.{layer}.ffn_up_shexp.weight", torch.zeros(narrow, wide)
        yield f"blk.{layer}.ffn_down_shexp.weight", torch.zeros(wide, narrow)


def _interleave(projection: Tensor, heads: int) -> Tensor:
    """Rows of q_proj or k_proj in the order of llama.cpp's Llama.

    It turns neighbours (0, 1), (2, 3), ... of a head where transformers turns (0, d/2), (1, d/2 + 1), ...
    """
    return projection.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
