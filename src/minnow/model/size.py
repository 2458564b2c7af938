"""What a shape costs: parameters and floating-point operations."""

from __future__ import annotations

from minnow.model.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, exactly; a tied head counts once."""
    width, head = config.hidden_size, config.head_dim
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    norms = 2 * width + (2 * head if config.qk_norm else 0)
    biases = (heads + 2 * key_heads) * head if config.attention_bias else 0
    biases += width if config.attention_output_bias else 0
    biases += 2 * config.intermediate_size + width if config.mlp_bias else 0
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    per_layer = _matrix_parameters_per_layer(config) + norms + biases
    return embeddings + config.num_hidden_layers * per_layer + width


def forward_flops_per_token(config: ModelConfig, mean_context: float) -> float:
    """Operations of one token's forward pass: 2 for each weight of a matrix, and the attention.

    `mean_context` is the mean number of keys a query attends to: (T + 1) / 2 for causal rows of T tokens.
    Looking up the embedding is free; the head is not. Attention costs 2 products of 2 * head_dim operations
    per key and head.
    """
    matrices = config.num_hidden_layers * _matrix_parameters_per_layer(config)
    matrices += config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim * mean_context
    return 2 * matrices + attention


def training_flops_per_token(config: ModelConfig, mean_context: float) -> float:
    """Operations of forward and backward: the backward pass costs twice the forward (recomputation not
    counted)."""
    return 3 * forward_flops_per_token(config, mean_context)


def _matrix_parameters_per_layer(config: ModelConfig) -> int:
    attention_width = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return config.hidden_size * (attention_width + 3 * config.intermediate_size)
