"""The tensors of a model folder: read from safetensors alone, and held against the model that they are for."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minnow.config import UserError
from minnow.json_file import read_json
from minnow.model.config import ModelConfig

WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards its index names. A folder that has both is read as
    transformers reads it: an index beside the whole file is left over from an older save."""
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / _INDEX}: no weight_map in it, which names each tensor's file: fetch it again")
        files = sorted(set(map(str, weight_map.values())))
        if outside := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise UserError(f"{folder / _INDEX}: it names {outside[0]}, which is no file of this folder")
    else:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth", ".pt"))
        also = f" ({pickled[0]} is a pickle, never read: convert it to safetensors)" if pickled else ""
        raise UserError(f"{folder}: no {WEIGHTS} in it{also}")
    weights: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {_INDEX} names {name}, which is not there")
        try:
            with safe_open(folder / name, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise UserError(f"{folder / name}: not a whole safetensors file ({error})") from error
    return weights


def require_layers(config: ModelConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Before they are made: ten million layers take minutes and all of the memory, though they hold no weights yet."""
    if config.num_hidden_layers > max(len(weights), 1000):
        raise UserError(
            f"{folder}: the weights do not fit config.json: they are {len(weights)} tensors, and it asks for "
            f"{config.num_hidden_layers} layers"
        )


def check_weights(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """UserError listing what does not fit `model`: tensors missing, left over or of another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in weights]
    problems += [f"unexpected {name} {tuple(weights[name].shape)}" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)} where config.json asks for {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(problems[:5])}{more}")
