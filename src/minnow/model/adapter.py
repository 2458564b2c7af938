"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minnow.config import UserError
from minnow.disk import opened_to_others
from minnow.json_file import read_json
from minnow.model.lora import Adapter, LoraConfig, LoraLinear, linear_names, lora_layers
from minnow.model.reward_model import RewardModel
from minnow.model.slices import whole
from minnow.model.transformer import CausalLM, Linear
from minnow.model.vision_language import VisionLanguageModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OURS, _IN_LLAVA = "model.", "model.language_model."
"""How a decoder's names begin, and how in transformers' classes that look at pictures, which PEFT goes by."""
_HEADS = ("classifier", "score")
"""What PEFT lists as saved whole of any sequence classifier; ours is called score."""
# What else PEFT can do: a value that is neither this one nor missing changes what the adapter computes.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "corda_config": None,
    "eva_config": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
}
# Ways to draw A and B that change the frozen weights too: PEFT changes them again when it loads such a file.
_INITIALIZATIONS_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter, not a whole model."""
    return (folder / CONFIG).is_file()


def is_reward_adapter(folder: Path) -> bool:
    """Whether the adapter in `folder` makes a reward model of its base: it brings the head along."""
    return bool(read_json(folder / CONFIG).get("task_type") == "SEQ_CLS")


def adapter_weights(model: CausalLM) -> dict[str, Tensor]:
    """The adapters of `model` and a reward model's head, by PEFT's names, on the CPU."""
    parameters = (_adapter_parameters(lora_layers(model)) | _head(model)).items()
    return {
        _PREFIX + _their_name(name, model): whole(parameter).detach().cpu().contiguous()
        for name, parameter in parameters
    }


def write_adapter(model: CausalLM, weights: dict[str, Tensor], folder: Path) -> None:
    """Write `weights`, the adapters of `model`, and nothing else of it, into an existing folder."""
    assert model.adapter is not None
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    opened_to_others(folder / WEIGHTS)
    text = json.dumps(_to_peft(model, model.adapter), indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def base_of(folder: Path) -> str:
    """The model that the adapter in `folder` belongs to: a folder or a Hub id. UserError where its file names none."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder / CONFIG}: it does not name its model (base_model_name_or_path)")
    return str(base)


def attach_adapter(model: CausalLM, folder: Path) -> None:
    """Put the adapter of `folder`, ours or PEFT's, onto its base `model`. UserError for what cannot be honoured.

    A reward model's head comes from the folder too.
    """
    layers = read_adapter(model, folder)
    model.requires_grad_(False)
    head = _head(model)
    if head:
        weights = _read_weights(folder, model)
        _copy_weights(head, {name: weights[name] for name in head if name in weights}, folder)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    config = read_json(folder / CONFIG)
    settings = LoraConfig(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        targets=tuple(layers),
    )
    model.adapter = Adapter(
        settings,
        config.get("base_model_name_or_path") or "",
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


def read_adapter(model: CausalLM, folder: Path) -> dict[str, LoraLinear]:
    """The adapted layers by name, around the weights of `model`, which stays as it is. UserError as above."""
    config, weights = read_json(folder / CONFIG), _read_weights(folder, model)
    _check_config(config, model, folder)
    known = set(linear_names(model))
    layers: dict[str, LoraLinear] = {}
    suffix = ".lora_A.weight"
    for name in [key.removesuffix(suffix) for key in weights if key.endswith(suffix)]:
        if name not in known:
            raise UserError(f"{folder}: it adapts {name}, which is no linear layer of the base model's decoder")
        rank = weights[name + suffix].shape[0]
        alpha = float(_by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        dropout = float(config.get("lora_dropout", 0.0))
        layers[name] = LoraLinear(linear, rank, scaling, dropout=dropout, dora=bool(config.get("use_dora")))
    _copy_weights(_adapter_parameters(layers), {n: w for n, w in weights.items() if n not in _head(model)}, folder)
    return layers


def _copy_weights(parameters: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> None:
    here = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if here != there:
        name = min(name for name in here.keys() | there if here.get(name) != there.get(name))
        raise UserError(
            f"{folder}: its adapters have other layers or another rank than this model's "
            f"({name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here)"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _check_config(config: dict[str, Any], model: CausalLM, folder: Path) -> None:
    """UserError for what would change what the adapter computes and is not known here."""
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, {}, [], None):
            raise UserError(f"{folder / CONFIG}: {key} = {config[key]!r} is not supported (only {plain!r})")
    if config.get("task_type") == "SEQ_CLS" and not isinstance(model, RewardModel):
        raise UserError(f"{folder}: a reward model's adapter, which writes nothing (use it with minnow eval --judge)")
    whole_modules = config.get("modules_to_save") or []
    if set(whole_modules) - (set(_HEADS) if isinstance(model, RewardModel) else set()):
        raise UserError(f"{folder / CONFIG}: modules_to_save = {whole_modules!r} is not supported")
    if str(config.get("init_lora_weights")).startswith(_INITIALIZATIONS_OF_THE_BASE):
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights = {config['init_lora_weights']!r} stands for a base with other "
            "weights than the one it names: save it with PEFT's path_initial_model_for_weight_conversion"
        )


def _head(model: CausalLM) -> dict[str, Tensor]:
    """What is trained and saved whole beside the adapters: the head of a reward model, which its base lacks."""
    return {"score.weight": model.score.weight} if isinstance(model, RewardModel) else {}


def _adapter_parameters(layers: dict[str, LoraLinear]) -> dict[str, Tensor]:
    return {
        f"{name}.{own}": parameter
        for name, layer in layers.items()
        for own, parameter in layer.named_parameters()
        if own.startswith("lora_")
    }


def _to_peft(model: CausalLM, adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    judges = isinstance(model, RewardModel)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if judges else "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "revision": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.chosen_alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": _target_modules(model),
        "rank_pattern": adapter.rank_pattern,
        "alpha_pattern": adapter.alpha_pattern,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": ["score"] if judges else None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    }


def _target_modules(model: CausalLM) -> list[str]:
    """Last parts of names (q_proj) where they mean exactly the adapted layers, else whole names."""
    adapted = list(lora_layers(model))
    ends = sorted({name.rpartition(".")[2] for name in adapted})
    left_out = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is Linear}
    left_out -= {"lora_A", "lora_B"}
    return [_their_name(name, model) for name in adapted] if left_out & set(ends) else ends


def _their_name(name: str, model: CausalLM) -> str:
    """A name of ours as PEFT has it."""
    return _IN_LLAVA + name.removeprefix(_OURS) if isinstance(model, VisionLanguageModel) else name


def _our_name(name: str, model: CausalLM) -> str:
    """The way back; what is no decoder's (an adapter of the tower) keeps a name that we do not know."""
    if isinstance(model, VisionLanguageModel) and name.startswith(_IN_LLAVA):
        return _OURS + name.removeprefix(_IN_LLAVA)
    return name


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern (a regular expression) that fits the end of the name."""
    fits = (value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", name))
    return next(fits, default)


def _read_weights(folder: Path, model: CausalLM) -> dict[str, Tensor]:
    """Tensors by the names that they have in `model`."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder}: no {WEIGHTS} in it (a pickle is never read)")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from error
    # Some versions of PEFT write the magnitudes as a module's weight.
    names = {key: key.removeprefix(_PREFIX).replace("magnitude_vector.weight", "magnitude_vector") for key in weights}
    return {_our_name(names[key], model): tensor for key, tensor in weights.items()}
