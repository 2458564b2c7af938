"""Named shapes: ours, and those of the published models we compare with."""

from __future__ import annotations

import difflib

from minnow.config import UserError
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig

PRESETS: dict[str, ModelConfig] = {
    # The quickstart's: small enough for minutes on two cores, vocabulary of the embedded world.
    "pond": ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ),
    "5m": ModelConfig(
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    # MiniMind2-Small's shape with QK-norm: ours, and that of the benchmarks.
    "26m": ModelConfig(),
    "26m-minimind2": ModelConfig(qk_norm=False, rope_theta=1e6, rms_norm_eps=1e-5, max_position_embeddings=2048),
    "64m": ModelConfig(  # minimind-3
        hidden_size=768,
        intermediate_size=2432,
        num_key_value_heads=4,
        head_dim=96,
        rope_theta=1e6,
        max_position_embeddings=2048,
    ),
    "198m-a64m": ModelConfig(  # minimind-3's mixture, with the router's weight left in (k = 1, not normalised)
        hidden_size=768,
        intermediate_size=2432,
        num_key_value_heads=4,
        head_dim=96,
        rope_theta=1e6,
        max_position_embeddings=2048,
        experts=ExpertsConfig(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=2432),
    ),
    "104m": ModelConfig(  # MiniMind2
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        head_dim=96,
        qk_norm=False,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
    ),
    # mini-llm's dense model as a Qwen2: its plain MLP of width 4,096 becomes a gated one of as many weights, for no
    # class has the plain one, and its heads of 16 turn in halves.
    "171m": ModelConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2736,
        num_hidden_layers=12,
        num_attention_heads=64,
        num_key_value_heads=32,
        head_dim=16,
        qk_norm=False,
        attention_bias=True,
    ),
    # MiniMind2-MoE, with a sigmoid router: no class has shared experts beside its softmax.
    "145m-a92m": ModelConfig(
        hidden_size=640,
        intermediate_size=1728,
        head_dim=80,
        qk_norm=False,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
        experts=ExpertsConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=1728, scoring="sigmoid", n_shared_experts=1
        ),
    ),
    # mini-llm's mixture as a Qwen3-MoE: experts gated like the MLP of 171m, QK-norm and no biases.
    "876m-a474m": ModelConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2736,
        num_hidden_layers=12,
        num_attention_heads=64,
        num_key_value_heads=32,
        head_dim=16,
        experts=ExpertsConfig(num_experts=8, num_experts_per_tok=4, moe_intermediate_size=2736, noisy=True),
    ),
    "1.7b": ModelConfig(  # VelocityLM, over GPT-2's vocabulary
        vocab_size=50257,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        qk_norm=False,
        max_position_embeddings=2048,
    ),
}


def preset(name: str) -> ModelConfig:
    """The shape called `name`; UserError naming the nearest one otherwise."""
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"no model preset {name!r}: there are {', '.join(PRESETS)}{hint}")
    return PRESETS[name]
