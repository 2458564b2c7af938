"""What a shape costs: parameters and floating-point operations."""

from __future__ import annotations

from minnow.model.config import ModelConfig
from minnow.model.vision_tower import VisionConfig


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, exactly; a tied head counts once."""
    width, head = config.hidden_size, config.head_dim
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    norms = 2 * width + (2 * head if config.qk_norm else 0)
    biases = (heads + 2 * key_heads) * head if config.attention_bias else 0
    biases += width if config.attention_output_bias else 0
    biases += 2 * config.intermediate_size + width if config.mlp_bias else 0
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    layers = sum(_matrix_parameters(config, layer) for layer in range(config.num_hidden_layers))
    return embeddings + layers + config.num_hidden_layers * (norms + biases) + width


def active_parameter_count(config: ModelConfig) -> int:
    """Parameters that work on one token: without the experts it is not sent to, and the noise of their router."""
    idle = sum(
        _matrix_parameters(config, layer) - _active_matrix_parameters(config, layer)
        for layer in range(config.num_hidden_layers)
    )
    return parameter_count(config) - idle


def forward_flops_per_token(config: ModelConfig, mean_context: float) -> float:
    """Operations of one token's forward pass: 2 for each weight of a matrix that it meets, and the attention.

    `mean_context` is the mean number of keys a query attends to: (T + 1) / 2 for causal rows of T tokens.
    Looking up the embedding is free; the head is not. Attention costs 2 products of 2 * head_dim operations
    per key and head.
    """
    attention = config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim * mean_context
    return _matrix_flops_per_token(config) + attention


def training_flops_per_token(config: ModelConfig, mean_context: float, *, frozen: bool = False) -> float:
    """Operations of forward and backward: the backward pass costs twice the forward (recomputation not
    counted). Of a `frozen` model beside adapters, which hardly count, one of its two products a matrix is not made."""
    spared = _matrix_flops_per_token(config) if frozen else 0
    return 3 * forward_flops_per_token(config, mean_context) - spared


def tower_parameter_count(vision: VisionConfig) -> int:
    """Number of parameters of a vision tower, the layers that no picture goes through included."""
    width, inner = vision.hidden_size, vision.intermediate_size
    embeddings = (3 * vision.patch_size**2 + 1 + vision.num_patches) * width
    layer = 4 * (width + 1) * width + (width + 1) * inner + (inner + 1) * width + 4 * width
    return embeddings + vision.num_hidden_layers * layer + 2 * width


def projector_parameter_count(vision: VisionConfig, width: int) -> int:
    """Number of parameters between a tower and a language model of that width."""
    return (vision.hidden_size + 1) * width + (width + 1) * width


def training_flops_per_picture(vision: VisionConfig, width: int, *, tower: bool, projector: bool) -> float:
    """Operations of tower and projector for one picture, which its image tokens' come on top of.

    tower, projector: whether they learn. What learns takes three passes' worth as in `training_flops_per_token`; what
    is frozen, with nothing that learns before it, is passed forward only.
    """
    inside = 4 * vision.hidden_size + 2 * vision.intermediate_size
    attention = vision.num_used_layers * 4 * vision.hidden_size * vision.num_patches
    patches = 2 * (3 * vision.patch_size**2 + vision.num_used_layers * inside) * vision.hidden_size
    projection = 2 * (vision.hidden_size + width) * width
    passes_of_tower, passes_of_projector = (3 if learns else 1 for learns in (tower, projector))
    return vision.num_patches * (passes_of_tower * (patches + attention) + passes_of_projector * projection)


def _matrix_flops_per_token(config: ModelConfig) -> int:
    matrices = sum(_active_matrix_parameters(config, layer) for layer in range(config.num_hidden_layers))
    return 2 * (matrices + config.vocab_size * config.hidden_size)


def _active_matrix_parameters(config: ModelConfig, layer: int) -> int:
    """Of layer number `layer`, what one token meets outside training's noise."""
    width = config.hidden_size
    attention = width * (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    if config.experts is None or not config.is_sparse(layer):
        return attention + 3 * width * config.intermediate_size
    experts = config.experts
    expert = 3 * width * experts.moe_intermediate_size
    router = experts.num_experts * width
    return attention + router + (experts.num_experts_per_tok + experts.n_shared_experts) * expert


def _matrix_parameters(config: ModelConfig, layer: int) -> int:
    """Of layer number `layer`, all."""
    active = _active_matrix_parameters(config, layer)
    if config.experts is None or not config.is_sparse(layer):
        return active
    experts = config.experts
    idle = (experts.num_experts - experts.num_experts_per_tok) * 3 * config.hidden_size * experts.moe_intermediate_size
    noise = experts.num_experts * config.hidden_size if experts.noisy else 0
    return active + idle + noise
