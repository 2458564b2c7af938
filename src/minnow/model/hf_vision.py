"""config.json and tensor names of `LlavaForConditionalGeneration`: a language model of ours behind a SigLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minnow.config import UserError
from minnow.model.vision_tower import VisionConfig
from minnow.tokenizer.images import MODEL_TYPE

ARCHITECTURE, TOWER_TYPE = "LlavaForConditionalGeneration", "siglip_vision_model"
_TOWER = "vision_tower."
# Ours, and what it is called in the file: the layout of transformers 4, which vLLM and transformers 5 read as well.
_PREFIXES = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
_SHAPE = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What transformers takes where a file leaves it out, and what of it we compute.
_TOWER_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
_TOWER_PLAIN = {"num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0}
_PLAIN = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}


def is_vision_language(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that looks at pictures."""
    return content.get("model_type") == MODEL_TYPE


def to_llava_config(text: dict[str, Any], vision: VisionConfig, image_token_id: int) -> dict[str, Any]:
    """The content of config.json. text: that of the language model alone."""
    inner = {key: value for key, value in text.items() if key not in ("architectures", "torch_dtype", "dtype")}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "text_config": inner | {"architectures": text["architectures"]},
        "vision_config": {
            "model_type": TOWER_TYPE,
            **{name: getattr(vision, name) for name in _SHAPE},
            **_TOWER_PLAIN,
            "layer_norm_eps": vision.layer_norm_eps,
            "vision_use_head": False,
        },
        "image_token_index": image_token_id,
        "image_seq_length": vision.num_patches,
        "vision_feature_layer": vision.vision_feature_layer,
        "vision_feature_select_strategy": "full",
        **_PLAIN,
        **{key: text[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype")},
        **{key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in text},
    }


def from_llava_config(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], VisionConfig, int]:
    """The language model's part, the tower's shape and the image token. UserError for what we do not compute."""
    text, tower = content.get("text_config"), content.get("vision_config")
    if not isinstance(text, dict) or not isinstance(tower, dict):
        raise UserError(f"{where}: no text_config or vision_config in it, which say what the model is made of")
    for key, plain in _PLAIN.items():
        if content.get(key, plain) != plain:
            raise UserError(f"{where}: {key} = {content[key]!r} is not supported (only {plain!r})")
    strategy = content.get("vision_feature_select_strategy", "default")
    if strategy != "full":
        raise UserError(
            f"{where}: vision_feature_select_strategy {strategy!r} is not supported (only 'full': SigLIP's)"
        )
    layer = content.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise UserError(f"{where}: vision_feature_layer {layer} is not supported (only one layer)")
    tied = content.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    token = content.get("image_token_index", content.get("image_token_id", 32000))
    return dict(text) | {"tie_word_embeddings": tied}, vision_config_from_hf(tower, where, layer), token


def vision_config_from_hf(tower: Mapping[str, Any], where: str, vision_feature_layer: int = -2) -> VisionConfig:
    """The shape of a SigLIP tower. UserError for another kind, and for what we do not compute."""
    kind = tower.get("model_type", TOWER_TYPE)
    if kind != TOWER_TYPE:
        raise UserError(f"{where}: a vision tower of model_type {kind!r} is not supported (only {TOWER_TYPE})")
    for key, plain in _TOWER_PLAIN.items():
        if tower.get(key, plain) != plain:
            raise UserError(f"{where}: the tower's {key} = {tower[key]!r} is not supported (only {plain!r})")
    shape = {key: tower.get(key, default) for key, default in _TOWER_DEFAULTS.items()}
    try:
        return VisionConfig(**shape, vision_feature_layer=vision_feature_layer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def to_llava_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to those of the file."""
    return {_renamed(name, _PREFIXES): tensor for name, tensor in weights.items()}


def from_llava_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a file to ours; transformers 5's newer names are read too. The pooling head is left out: no patch goes
    through it."""
    back = {theirs: ours for ours, theirs in _PREFIXES.items()}
    return {
        _renamed(tower_name(name), back): tensor
        for name, tensor in weights.items()
        if not tower_name(name).startswith("vision_tower.vision_model.head.")
    }


def tower_name(name: str) -> str:
    """A tower's tensor under the name of transformers 4, whichever wrote it."""
    if name.startswith(_TOWER) and not name.startswith(_TOWER + "vision_model."):
        return f"{_TOWER}vision_model.{name.removeprefix(_TOWER)}"
    return name


def tower_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a SigLIP checkpoint (vision and text, or vision alone) the tower's tensors, under our names in the tower."""
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    kept = ("embeddings.", "encoder.", "post_layernorm.")
    return {
        f"vision_model.{name}": tensor
        for name, tensor in bare.items()
        if name.startswith(kept) and not name.endswith("position_ids")
    }


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
