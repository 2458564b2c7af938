"""config.json: our shape to and from transformers' Llama, Qwen2, Qwen3, Qwen3-MoE and GLM-4-MoE configurations."""

from __future__ import annotations

from typing import Any

import torch

from minnow.config import UserError
from minnow.model.config import ModelConfig, RopeScaling
from minnow.model.context import yarn_attention_factor
from minnow.model.hf_defaults import DEFAULTS, SIZES, with_defaults
from minnow.model.hf_experts import experts_from_hf, experts_to_hf

_MODEL_TYPES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Glm4MoeForCausalLM": "glm4_moe",
}
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_PLAIN: tuple[tuple[str, tuple[Any, ...]], ...] = (
    # Attribute, and the values that mean what this decoder computes. pretraining_tp is not here: it cuts the same
    # products into slices.
    ("hidden_act", ("silu", "swish")),
    ("attention_dropout", (0,)),
    ("partial_rotary_factor", (1,)),
    ("quantization_config", (None,)),
    ("is_causal", (True,)),
    ("add_cross_attention", (False,)),
    ("pruned_heads", (None, {})),
)


def architecture(config: ModelConfig) -> str:
    """The transformers class that computes what this shape computes."""
    if config.experts is not None:
        return "Qwen3MoeForCausalLM" if config.experts.scoring == "softmax" else "Glm4MoeForCausalLM"
    if config.qk_norm:
        return "Qwen3ForCausalLM"
    is_qwen2 = config.attention_bias and not config.attention_output_bias
    return "Qwen2ForCausalLM" if is_qwen2 else "LlamaForCausalLM"


def to_hf_config(config: ModelConfig, dtype: torch.dtype, token_ids: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, right for readers of transformers 4 (rope_theta, torch_dtype) and 5.

    token_ids: bos_token_id, eos_token_id and pad_token_id (None where not known).
    """
    name = architecture(config)
    scaling = _scaling_to_hf(config.rope_scaling)
    content: dict[str, Any] = {
        "architectures": [name],
        "model_type": _MODEL_TYPES[name],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        **token_ids,
    }
    if name != "Qwen2ForCausalLM":
        content["attention_bias"] = config.attention_bias
    if config.experts is not None:
        content |= experts_to_hf(config.experts, qk_norm=config.qk_norm)
    if name == "Glm4MoeForCausalLM":
        content["tie_word_embeddings"] = False  # vLLM and llama.cpp want the head: it is written out
        content["rope_parameters"]["partial_rotary_factor"] = 1.0
    elif name == "LlamaForCausalLM":
        content["mlp_bias"] = config.mlp_bias
    else:
        content |= {"use_sliding_window": False, "sliding_window": None}
    return content


def from_hf_config(content: dict[str, Any], where: str) -> ModelConfig:
    """Read the content of a config.json; UserError, naming `where`, for what this decoder does not
    compute."""
    model_type, name = content.get("model_type"), (content.get("architectures") or ["none named"])[0]
    name = name.replace("ForSequenceClassification", "ForCausalLM")  # a reward model: the same decoder, another head
    if model_type not in DEFAULTS or name not in (*_MODEL_TYPES, "none named"):
        raise UserError(
            f"{where}: architecture {name} (model_type {model_type!r}) is not supported; "
            f"these are: {', '.join(_MODEL_TYPES)}"
        )
    _refuse_variants(content, where)
    missing = [key for key in SIZES if content.get(key) is None]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)} in it; is this the config.json of a language model?")
    content = with_defaults(content, where)
    _refuse_sliding(content, where)
    heads = content["num_attention_heads"]
    theta, scaling = _rope_from_hf(content, where)
    # Qwen2 has its biases whatever config.json says, and never on o_proj.
    bias = model_type == "qwen2" or bool(content["attention_bias"])
    try:
        return ModelConfig(
            **{key: content[key] for key in SIZES},
            num_key_value_heads=content["num_key_value_heads"] or heads,
            head_dim=content.get("head_dim") or content["hidden_size"] // heads,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=content["rms_norm_eps"],
            tie_word_embeddings=content["tie_word_embeddings"],
            qk_norm=model_type in ("qwen3", "qwen3_moe") or (model_type == "glm4_moe" and bool(content["use_qk_norm"])),
            attention_bias=bias,
            attention_output_bias=bias and model_type not in ("qwen2", "glm4_moe"),
            mlp_bias=model_type == "llama" and bool(content["mlp_bias"]),
            experts=experts_from_hf(content),
            max_position_embeddings=_longest(content, scaling),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _refuse_variants(content: dict[str, Any], where: str) -> None:
    """What the class of this model_type would compute otherwise is refused by name, never left out."""
    for key, plain in _PLAIN:
        if key in content and content[key] not in (*plain, None):
            raise UserError(f"{where}: {key} = {content[key]!r} is not supported (only {plain[0]!r})")


def _refuse_sliding(content: dict[str, Any], where: str) -> None:
    """Refuse a model of which a layer sees no further back than a window; the keys alone do no harm.

    Qwen2's and Qwen3's classes take a kind for each layer, from max_window_layers where there is no list; Qwen3-MoE's
    has the window in all layers or in none; Llama's and GLM-4-MoE's look at none of these keys.
    """
    if content["model_type"] not in ("qwen2", "qwen3", "qwen3_moe"):
        return
    slides = content["use_sliding_window"] and content["sliding_window"] is not None
    if content["model_type"] == "qwen3_moe":
        kinds = {"sliding_attention" if slides else "full_attention"}
    elif content.get("layer_types"):
        kinds = set(content["layer_types"])
    else:
        last_slides = slides and content["num_hidden_layers"] > content["max_window_layers"]
        kinds = {"sliding_attention" if last_slides else "full_attention"}
    if kinds != {"full_attention"}:
        keys = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
        given = ", ".join(f"{key} {content.get(key)}" for key in keys)
        raise UserError(
            f"{where}: layers of {', '.join(sorted(kinds - {'full_attention'}))} are not supported, "
            f"only full_attention ({given})"
        )


def _rope_from_hf(content: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Transformers 5 writes rope_parameters, 4 writes rope_theta and rope_scaling; a file may have both if they agree.

    Where they do not, transformers 5 takes rope_scaling and drops the other without a word. Often that is what a user
    added to a file that has both, and as often what somebody forgot in it: only they can know.
    """
    read = {
        key: _read_rope(content[key], content, where) for key in ("rope_parameters", "rope_scaling") if content.get(key)
    }
    if len(read) == 2 and read["rope_parameters"] != read["rope_scaling"]:
        raise UserError(
            f"{where}: rope_parameters {content['rope_parameters']} and rope_scaling {content['rope_scaling']} (where "
            f"they leave them out, rope_theta is {content['rope_theta']} and partial_rotary_factor "
            f"{content['partial_rotary_factor']}) contradict each other: write the same into both, or remove one"
        )
    theta, scaling, turned = next(iter(read.values())) if read else _read_rope({}, content, where)
    if turned not in (1, None):
        raise UserError(f"{where}: partial_rotary_factor = {turned!r} is not supported (only 1)")
    return theta, scaling


def _read_rope(
    rope: dict[str, Any], content: dict[str, Any], where: str
) -> tuple[float, RopeScaling | None, float | None]:
    """What one set of rope parameters comes to: the base, the scaling and the share of a head that is turned."""
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{where}: rope parameters by layer type are not supported (only one set for all layers)")
    for key in _ROPE_NUMBERS:
        if isinstance(rope.get(key), (str, list)):
            raise UserError(f"{where}: {key} = {rope[key]!r} in the rope's parameters is not a number")
    theta = float(rope.get("rope_theta") or content["rope_theta"])
    turned = rope.get("partial_rotary_factor", content["partial_rotary_factor"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:
        hint = ""
        if kind == "dynamic":
            # Its angles depend on the longest row of the batch, and keys in a cache keep the angles of their time.
            hint = "; within the trained length it is 'default', beyond it --rope-scaling ntk or yarn takes its place"
        raise UserError(f"{where}: rope type {kind!r} is not supported (only {', '.join(_ROPE_TYPES)}{hint})")
    return theta, None if kind == "default" else _scaling_from_hf(kind, rope, content, where), turned


def _scaling_from_hf(kind: Any, rope: dict[str, Any], content: dict[str, Any], where: str) -> RopeScaling:
    if kind == "yarn" and (rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("truncate") is False):
        raise UserError(f"{where}: yarn with mscale or without truncation is not supported")
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    missing = [key for key in needed if rope.get(key) is None]
    if missing:
        raise UserError(f"{where}: the rope type {kind!r} needs a {', a '.join(missing)}")
    factor = float(rope["factor"])
    longest = content["max_position_embeddings"]
    # Readers prefer the length that stands outside of the rope's parameters.
    trained = content.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if trained is None:  # readers take the longest itself for yarn; linear does not ask
        trained = round(longest / factor) if kind == "linear" else longest
    # What readers take when it is not written.
    attention_factor = float(rope.get("attention_factor") or yarn_attention_factor(factor))
    return RopeScaling(
        type=kind,
        factor=factor,
        original_max_position_embeddings=trained,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=attention_factor if kind == "yarn" else 1.0,
        low_freq_factor=float(rope.get("low_freq_factor") or 1),
        high_freq_factor=float(rope.get("high_freq_factor") or 4),
    )


def _longest(content: dict[str, Any], scaling: RopeScaling | None) -> int:
    """The longest sequence that the model reads, in tokens.

    A yarn with the trained length beside it says by itself how far it reaches, and max_position_embeddings may still be
    the trained length (Qwen's cards ask for rope_scaling alone): no reader of transformers stops there.
    """
    written: int = content["max_position_embeddings"]
    places = (content, content.get("rope_parameters") or {}, content.get("rope_scaling") or {})
    if scaling is None or scaling.type != "yarn" or not any(p.get("original_max_position_embeddings") for p in places):
        return written
    return max(written, round(scaling.original_max_position_embeddings * scaling.factor))


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    content: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "linear":
        return content  # readers warn of any other key
    if scaling.type == "yarn":
        content |= {
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        }
    if scaling.type == "llama3":
        content |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return content | {"original_max_position_embeddings": scaling.original_max_position_embeddings}
