"""Checkpoints: everything a run needs to continue bit for bit, written beside the training, whole or not at all.

`checkpoints/step-00000100/` holds

- `shard-*.safetensors`: weights and optimizer state, each process's slices in a file of its own. torch's distributed
  checkpoint (DCP) writes and reads them, so another number of processes can load what this one saved;
- `state.json`: counters, best validation, random generators; `config.yaml`: the run's; `source.pt`: what a source of
  batches wants remembered, if any;
- `complete.json`: every file's size and sha256. It is written last: a folder without it is no checkpoint.

Frozen weights are not in it: they come from the model that the run started from.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.optim import Optimizer

from minnow.config import UserError
from minnow.data.shards import file_sha256
from minnow.model.transformer import CausalLM
from minnow.optim import load_named_state, named_state
from minnow.training.distribution import gather, host_group, rank, world_size

# DCP says in every run of one process that it is one.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

COMPLETE, STATE, SOURCE = "complete.json", "state.json", "source.pt"
_MODEL, _OPTIMIZER = "model.", "optimizer."
_NAME = re.compile(r"step-\d{8}")  # and not a copy that somebody made beside it


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint folder."""

    folder: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Return the loop's own state: counters, best validation, random generators, loss scale."""
        state: dict[str, Any] = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        return state

    def source_state(self) -> dict[str, Any]:
        """Return what the source of batches wanted remembered, on the host: the first one's GPU is not another's."""
        state: dict[str, Any] = torch.load(self.folder / SOURCE, map_location="cpu", weights_only=True)
        return state

    def problem(self) -> str | None:
        """Read every file and say which is not what was written, or None. The processes share the files out."""
        try:
            files = json.loads((self.folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, LookupError, TypeError):
            return f"{COMPLETE} is damaged"
        mine = sorted(files)[rank() :: world_size()]
        found = (_file_problem(self.folder / name, files[name]) for name in mine)
        return next((p for problems in gather([p for p in found if p]) for p in problems), None)

    def load(self, model: CausalLM, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """Copy weights and optimizer state into `model` and `optimizers`; return the loop's state.

        UserError for a checkpoint of another model or optimizer.
        """
        reader = HuggingFaceStorageReader(str(self.folder))
        saved = {key: meta.size for key, meta in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
        tensors = {_MODEL + name: tensor for name, tensor in trained_tensors(model).items()}
        different = tensors.keys() ^ {key for key in saved if key.startswith(_MODEL)}
        if different:
            raise UserError(f"{self.folder}: it is of another model ({min(different)} is in only one of the two)")
        parameters = dict(model.named_parameters())
        for key in saved.keys() - tensors.keys():
            name = key.removeprefix(_OPTIMIZER).rpartition(":")[0]
            like = parameters.get(name)
            is_sliced = like is not None and saved[key] == like.shape
            tensors[key] = torch.zeros_like(like) if is_sliced else torch.zeros(saved[key])  # type: ignore[arg-type]
        dcp.load(tensors, storage_reader=reader, process_group=host_group(), no_dist=world_size() == 1)
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(_OPTIMIZER):
                name, _, entry = key.removeprefix(_OPTIMIZER).rpartition(":")
                by_parameter.setdefault(name, {})[entry] = tensor.squeeze(0) if entry == "step" else tensor
        load_named_state(optimizers, by_parameter)
        state = self.state()
        if rank() < len(state["rng"]):  # more processes than before: the new ones have their own from the start
            set_random_state(state["rng"][rank()])
        return state


def random_state() -> dict[str, str]:
    """The generators that dropout draws from, a GPU's where one is in use, in hex."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # to ask it sooner would take memory of a GPU that a run on the CPU leaves alone
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return {device: generator.numpy().tobytes().hex() for device, generator in state.items()}


def set_random_state(state: dict[str, str]) -> None:
    """Put back what `random_state` gave; a GPU's only where there is one."""
    generators = {name: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8) for name, text in state.items()}
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    if "mps" in generators and torch.backends.mps.is_available():
        torch.mps.set_rng_state(generators["mps"])


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state without frozen parameters, as live tensors."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def tensors_to_save(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, dict[str, Tensor]]:
    """Return everything that goes into the shards, as live tensors: copy before the next step."""
    # DCP reads slices, of which a tensor without dimensions (a count of steps) has none.
    states = {
        f"{name}:{entry}": tensor.reshape(1) if tensor.ndim == 0 else tensor
        for name, entries in named_state(optimizers).items()
        for entry, tensor in entries.items()
    }
    return {_MODEL.rstrip("."): trained_tensors(model), _OPTIMIZER.rstrip("."): states}


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return [checkpoint for checkpoint in _folders(folder) if (checkpoint.folder / COMPLETE).exists()]


def newest_valid(folder: Path, step: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint whose files are what was written, and why newer ones were passed over.

    `step`: only this one will do; UserError when it is not there or not whole.
    """
    passed_over: list[str] = []
    for checkpoint in reversed(_folders(folder)):
        if step is not None and checkpoint.step != step:
            continue
        is_complete = (checkpoint.folder / COMPLETE).exists()
        problem = checkpoint.problem() if is_complete else "unfinished: the run stopped while it was being written"
        if problem is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.folder.name}: {problem}")
    if step is not None:
        raise UserError(f"step {step}: {passed_over[0] if passed_over else f'{folder} has no such checkpoint'}")
    return None, passed_over


def prune_checkpoints(folder: Path, *, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` complete ones and the best, and what was left half-written before them."""
    complete = list_checkpoints(folder)
    kept = {c.step for c in complete[-keep_last:]} | {best_step}
    for checkpoint in _folders(folder):
        if checkpoint.step not in kept and complete and checkpoint.step <= complete[-1].step:
            delete_checkpoint(checkpoint.folder)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its mark of completeness first: half of one must never pass for a whole."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def delete_after(folder: Path, step: int) -> None:
    """Delete checkpoints of steps after `step`: the run goes on from there and will write them again."""
    for checkpoint in _folders(folder):
        if checkpoint.step > step:
            delete_checkpoint(checkpoint.folder)


def describe_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of files by name."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}


def _folders(folder: Path) -> list[Checkpoint]:
    paths = [path for path in folder.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted((Checkpoint(path, int(path.name.removeprefix("step-"))) for path in paths), key=lambda c: c.step)


def _file_problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry.get("bytes"):
        return f"{path.name} has {path.stat().st_size} bytes, {entry.get('bytes')} were written"
    if file_sha256(path) != entry.get("sha256"):
        return f"{path.name} is not what was written (its sha256 differs)"
    return None
