"""What transformers' configuration classes take for a key that config.json leaves out."""

from __future__ import annotations

from typing import Any

from minnow.config import UserError

_DENSE: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
}
_WINDOW: dict[str, Any] = {"use_sliding_window": False, "sliding_window": 4096}
_QWEN: dict[str, Any] = _DENSE | _WINDOW | {"num_key_value_heads": 32, "max_window_layers": 28}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _DENSE
    | {"max_position_embeddings": 2048, "num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
    "qwen3_moe": _DENSE
    | _WINDOW
    | {
        "num_key_value_heads": 4,
        "attention_bias": False,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "glm4_moe": _DENSE
    | {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 8,
        "attention_bias": False,
        "use_qk_norm": False,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": True,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
}
"""By model_type. `SIZES` are not here."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Keys that a file must have."""
_EXAMPLES: dict[str, Any] = dict.fromkeys((*SIZES, "head_dim", "num_key_value_heads"), 1) | {
    "rope_parameters": {},
    "rope_scaling": {},
}
"""Of the kind of value that a key has, where no default of its class shows it."""
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "an object"}
_NULL_IS_A_VALUE = ("num_key_value_heads", "sliding_window", "partial_rotary_factor")


def with_defaults(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The content of a config.json of one of these model types, with what it leaves out. null is left out too, but
    where it says something: as many key heads as heads, no window, heads turned whole.

    UserError for a value of another kind than the key has: "256" is no size.
    """
    defaults = DEFAULTS[content["model_type"]]
    written = {key: value for key, value in content.items() if value is not None or key in _NULL_IS_A_VALUE}
    for key, example in (defaults | _EXAMPLES).items():
        if written.get(key) is not None and not _is_like(written[key], example):
            raise UserError(f"{where}: {key} = {written[key]!r} is not {_KINDS[type(example)]}")
    return defaults | written


def _is_like(value: Any, example: Any) -> bool:
    """A whole number may stand for a number, and true for nothing but itself."""
    if isinstance(value, bool) or isinstance(example, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    return isinstance(value, (int, float) if isinstance(example, float) else type(example))
