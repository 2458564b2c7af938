"""Model folders in plain Hugging Face format: config, safetensors, generation config, tokenizer."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minnow.config import UserError
from minnow.disk import new_folder_beside, opened_to_others, replace_folder, told_when_full
from minnow.errors import first_line
from minnow.hub import is_hub_id
from minnow.json_file import read_json
from minnow.model.adapter import (
    adapter_weights,
    attach_adapter,
    base_of,
    is_adapter,
    is_reward_adapter,
    write_adapter,
)
from minnow.model.config import ModelConfig
from minnow.model.hf_config import architecture, from_hf_config, to_hf_config
from minnow.model.hf_vision import (
    from_llava_config,
    from_llava_names,
    is_vision_language,
    to_llava_config,
    to_llava_names,
    tower_weights,
    vision_config_from_hf,
)
from minnow.model.lora import merge_lora
from minnow.model.reward_model import RewardModel, classification_config, is_classification
from minnow.model.slices import whole, writes
from minnow.model.stacking import stack_experts, unstack_experts
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
from minnow.model.vision_tower import VisionConfig, VisionTower
from minnow.model.weight_files import WEIGHTS, check_weights, read_weights, require_layers
from minnow.tokenizer.images import require_siglip_pixels

if TYPE_CHECKING:
    from minnow.tokenizer.tokenizer import Tokenizer

_KEPT_IN_FP32 = "e_score_correction_bias"  # small steps add up in it; transformers keeps it so too
TRAINING_ONLY = "gate.noise_weight"
"""Parameters whose names end so are left out of model folders: no class has a place for them."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_pretrained(
    model: CausalLM,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model` to `folder`, whole or not at all; an older folder there is replaced.

    Of a model with adapters only those are written, in PEFT's files: the frozen base stays where it is.
    Of a model in slices (FSDP2) every process must call it: the slices are gathered, and the first process writes.
    dtype: of the stored weights; None keeps the parameters' own. With a tokenizer, its files are written
    too and the ids at which `transformers.generate` starts, stops and pads. DiskFull when there is no room.
    """
    folder = Path(folder).resolve()  # where a link leads, not in the link's place
    if model.adapter is not None:
        weights = adapter_weights(model)
    else:
        weights = _stored_weights(model, dtype)
    if not writes():
        return
    with told_when_full(folder), new_folder_beside(folder) as temporary:
        if tokenizer is not None:
            beside = copy.copy(tokenizer)  # its pictures' format is the model's, whatever it came with
            beside.image_format = model.image_format if isinstance(model, VisionLanguageModel) else None
            beside.save_pretrained(temporary)
        if model.adapter is not None:
            write_adapter(model, weights, temporary)
        else:
            _write_model(model, weights, temporary, tokenizer, dtype)
        for path in temporary.iterdir():
            with open(path, "rb+") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
        replace_folder(temporary, folder)


def _write_model(
    model: CausalLM,
    weights: dict[str, Tensor],
    folder: Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None,
) -> None:
    stored = model.head_weight.dtype if dtype is None else dtype
    generation = _generation_config(model, tokenizer)
    stops = generation.get("eos_token_id")
    token_ids = {name: generation.get(name) for name in _TOKEN_IDS}
    token_ids["eos_token_id"] = stops[0] if isinstance(stops, list) else stops
    if isinstance(model, VisionLanguageModel):
        weights = to_llava_names(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    opened_to_others(folder / WEIGHTS)
    content = to_hf_config(model.config, stored, token_ids)
    if isinstance(model, RewardModel):
        content = classification_config(content)
    if isinstance(model, VisionLanguageModel):
        content = to_llava_config(content, model.vision, model.image_token_id)
    _write_json(folder / "config.json", content)
    if generation:
        _write_json(folder / "generation_config.json", generation)


def load_pretrained(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CausalLM:
    """Read a Qwen3, Qwen2, Llama, Qwen3-MoE or GLM-4-MoE folder (ours or anybody's), a run folder or a Hub id.

    A LLaVA folder whose language model is one of these gives a `VisionLanguageModel`.

    An adapter's folder gives its base with the adapter merged into it: a plain model. base: where that lies now, if
    not where it did; only of an adapter.
    dtype: of the parameters and of compute_dtype; None keeps what is stored. Every tensor must be there in
    its shape and none may be left over: UserError lists what does not fit.
    """
    folder = resolve_model_folder(folder)
    if is_reward_model(folder):
        raise UserError(f"{folder}: a reward model, which writes nothing (use it with minnow eval --judge)")
    if is_adapter(folder) or base is not None:
        return _merged(load_with_adapter(folder, base), dtype, device)
    config, weights = read_config(folder), read_weights(folder)
    seeing = read_vision(folder)
    weights = stack_experts(weights if seeing is None else from_llava_names(weights))
    if architecture(config) == "Glm4MoeForCausalLM" and _is_tied(weights):
        # That class is always stored with a head; a head that is the embedding bit by bit was tied when written.
        config = dataclasses.replace(config, tie_word_embeddings=True)
    require_layers(config, weights, folder)
    with torch.device("meta"):
        model = CausalLM(config) if seeing is None else VisionLanguageModel(config, *seeing)
    _fill(model, weights, folder, dtype, device)
    model.generation_config = _read_generation_config(folder)
    return model


def load_reward_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RewardModel:
    """Read a sequence-classification folder with one label (ours or anybody's) whose decoder is one of ours.

    An adapter's folder gives its base with adapter and head merged into it. UserError for a language model, and as in
    `load_pretrained`.
    """
    folder = resolve_model_folder(folder)
    if not is_reward_model(folder):
        raise UserError(f"{folder}: a language model, not a reward model (minnow reward makes one of it)")
    if is_adapter(folder):
        merged = _merged(load_with_adapter(folder), dtype, device)
        assert isinstance(merged, RewardModel)
        return merged
    config, weights = read_config(folder), stack_experts(read_weights(folder))
    require_layers(config, weights, folder)
    with torch.device("meta"):
        model = RewardModel(config)
    weights.pop("lm_head.weight", None)  # some writers leave it in
    _fill(model, weights, folder, dtype, device)
    return model


def is_reward_model(folder: Path) -> bool:
    """Whether a resolved folder holds a sequence-classification model, or an adapter that makes one of its base."""
    if is_adapter(folder):
        return is_reward_adapter(folder)
    return is_classification(read_json(folder / "config.json"))


def _fill(
    model: CausalLM, weights: dict[str, Tensor], folder: Path, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Check the weights against a model made on "meta" and put them into it."""
    _drop_duplicates(model, weights)
    check_weights(model, weights, folder)
    weights = {name: tensor.to(device, _stored_dtype(name, tensor, dtype)) for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=True)
    model.compute_dtype = model.head_weight.dtype


def load_with_adapter(folder: str | Path, base: str | Path | None = None) -> CausalLM:
    """The adapter in `folder` on its base, not merged; a `RewardModel` where it brings a head.

    base: where the base lies now, if not where it did. UserError for a whole model, and for a base that cannot be had.
    """
    folder = resolve_model_folder(folder)
    if not is_adapter(folder):
        raise UserError(f"{folder}: a whole model, not an adapter (it has no adapter_config.json)")
    base_folder = _base_folder(folder, base)
    if not is_reward_adapter(folder):
        model = load_pretrained(base_folder)
    elif is_reward_model(base_folder):
        model = load_reward_model(base_folder)
    else:
        model = RewardModel.from_language_model(load_pretrained(base_folder))
    attach_adapter(model, folder)
    return model


def _merged(model: CausalLM, dtype: torch.dtype | None, device: torch.device | str) -> CausalLM:
    """Merge the adapters of `model`, and put it on `device`; None keeps what is stored."""
    merge_lora(model)
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)  # the routers' biases stay fp32
    model.compute_dtype = model.head_weight.dtype
    return model


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a resolved folder; of an adapter, its base's."""
    folder = Path(folder)
    if is_adapter(folder):
        return read_config(_base_folder(folder))
    content, where = read_json(folder / "config.json"), str(folder / "config.json")
    if is_vision_language(content):
        content, _, _ = from_llava_config(content, where)
    return from_hf_config(content, where)


def read_vision(folder: Path) -> tuple[VisionConfig, int] | None:
    """The tower's shape and the image token of the model in a resolved folder, or of an adapter's base; None for one
    that only reads."""
    if is_adapter(folder):
        return read_vision(_base_folder(folder))
    content, where = read_json(folder / "config.json"), str(folder / "config.json")
    return from_llava_config(content, where)[1:] if is_vision_language(content) else None


def read_tower(folder: Path) -> VisionConfig:
    """The shape of the vision tower of a SigLIP checkpoint in a resolved folder.

    UserError for a tower that we do not compute, and for one that has learnt from pictures prepared in another way.
    """
    require_siglip_pixels(folder)
    content, where = read_json(folder / "config.json"), str(folder / "config.json")
    return vision_config_from_hf(content.get("vision_config") or content, where)


def load_vision_tower(folder: str | Path) -> tuple[VisionConfig, VisionTower]:
    """The vision tower of a SigLIP checkpoint: a folder, or a Hub id, with or without the text side.

    UserError as in `load_pretrained`.
    """
    folder = resolve_model_folder(folder)
    config = read_tower(folder)
    weights = tower_weights(read_weights(folder))
    with torch.device("meta"):
        tower = VisionTower(config)
    check_weights(tower, weights, folder)
    tower.load_state_dict(weights, assign=True)
    return config, tower


def _base_folder(folder: Path, base: str | Path | None = None) -> Path:
    try:
        return resolve_model_folder(base or base_of(folder))
    except UserError as error:
        raise UserError(f"{folder} is an adapter, and its base cannot be had: {error}") from error


def resolve_model_folder(model: str | Path) -> Path:
    """The folder of MODEL: a model's or an adapter's, a run's (its `model/`), or a Hub id's, which is downloaded.

    UserError where there is none.
    """
    path = Path(model)
    for candidate in (path, path / "model"):
        if is_model_folder(candidate):
            return candidate
    if path.exists():
        raise UserError(f"{path}: neither a model folder (it has no config.json) nor a run folder with model/ in it")
    if not is_hub_id(str(model)):
        raise UserError(f"{model}: no such folder (and not a Hugging Face id, which reads OWNER/NAME)")
    # Imported here: a local folder needs no Hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
        folder = Path(snapshot_download(str(model), allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"{model}: no such folder here, and the Hugging Face Hub could not give it ({first_line(error)})"
        ) from error
    if not is_model_folder(folder):
        raise UserError(f"{model}: the Hub has it, but without a config.json")
    return folder


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` holds a model or an adapter."""
    return (folder / "config.json").is_file() or is_adapter(folder)


def _read_generation_config(folder: Path) -> dict[str, Any]:
    """What generation_config.json says; without one, the ids that config.json has."""
    file = folder / "generation_config.json"
    if file.is_file():
        written_by = ("transformers_version", "_from_model_config")
        return {key: value for key, value in read_json(file).items() if key not in written_by}
    config = read_json(folder / "config.json")
    return {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}


def _generation_config(model: CausalLM, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What a model was loaded with, and the ids of its tokenizer; it stops at those of either."""
    if tokenizer is None:
        return model.generation_config
    named = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    stops = list(dict.fromkeys([*tokenizer.stop_ids, *model.stop_ids]))
    return named | model.generation_config | {"eos_token_id": stops}


def _stored_weights(model: CausalLM, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of model.safetensors: experts one by one, without what serves training only."""
    weights = {
        name: tensor.detach().to("cpu", _stored_dtype(name, tensor, dtype)).contiguous()
        for name, tensor in unstack_experts({k: whole(v) for k, v in model.state_dict().items()}).items()
        if not name.endswith(TRAINING_ONLY)
    }
    if architecture(model.config) == "Glm4MoeForCausalLM" and model.lm_head is None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return weights


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return torch.float32 if name.endswith(_KEPT_IN_FP32) else dtype or tensor.dtype


def _is_tied(weights: dict[str, Tensor]) -> bool:
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    return head is not None and embedding is not None and torch.equal(head, embedding)


def _drop_duplicates(model: CausalLM, weights: dict[str, Tensor]) -> None:
    """Take out what older writers stored twice: the tied head, and the rotary frequencies."""
    for name in [name for name in weights if name.endswith(".rotary_emb.inv_freq")]:
        del weights[name]
    if model.config.tie_word_embeddings and _is_tied(weights):
        del weights["lm_head.weight"]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
