"""Checkpoints: everything a run needs to continue bit for bit, written whole or not at all.

`checkpoints/step-00000100/` holds the model (Hugging Face format, fp32 masters) or its adapters,
`optimizers.safetensors` and `state.json`. It is written under a temporary name and renamed, so a folder called `step-*`
is always complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minnow.model.pretrained import load_weights, save_pretrained, save_training_only, training_only_weights
from minnow.model.slices import whole
from minnow.model.transformer import CausalLM
from minnow.optim import load_named_state, named_state
from minnow.training.distribution import is_first


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint folder."""

    folder: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Return the loop's own state: counters, best validation, random generators, loss scale."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        return state

    def source_state(self) -> dict[str, Any]:
        """Return what the source of batches wanted remembered."""
        state: dict[str, Any] = torch.load(self.folder / "source.pt", weights_only=True)
        return state

    def load(self, model: CausalLM, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
        """Copy weights and optimizer state into `model` and `optimizers`; return the loop's state."""
        load_weights(model, self.folder)
        state = self.state()
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(self.folder / "optimizers.safetensors").items():
            name, _, entry = key.rpartition(":")
            by_parameter.setdefault(name, {})[entry] = tensor
        load_named_state(optimizers, by_parameter)
        torch.set_rng_state(torch.tensor(state["rng"]["torch"], dtype=torch.uint8))
        return state


def save_checkpoint(
    folder: Path,
    step: int,
    model: CausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    source: dict[str, Any] | None = None,
) -> Checkpoint:
    """Write `folder/step-XXXXXXXX` atomically. `state` must be plain JSON; `source` may hold tensors."""
    tensors = {
        f"{name}:{entry}": whole(tensor).cpu().contiguous()
        for name, entries in named_state(optimizers).items()
        for entry, tensor in entries.items()
    }
    training_only = training_only_weights(model)
    final = folder / f"step-{step:08d}"
    if not is_first():
        save_pretrained(model, final)
        return Checkpoint(final, step)
    temporary = folder / f".step-{step:08d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_pretrained(model, temporary)
        save_training_only(training_only, temporary)
        save_file(tensors, temporary / "optimizers.safetensors")
        rng = {"torch": torch.get_rng_state().tolist()}
        text = json.dumps({**state, "step": step, "rng": rng})
        (temporary / "state.json").write_text(text, encoding="utf-8")
        if source is not None:
            torch.save(source, temporary / "source.pt")
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(final, step)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints in `folder`, oldest first."""
    found = (path for path in folder.glob("step-*") if path.is_dir())
    return sorted((Checkpoint(path, int(path.name.removeprefix("step-"))) for path in found), key=lambda c: c.step)


def prune_checkpoints(folder: Path, *, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` and the best one, and what a killed run left half-written."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for checkpoint in list_checkpoints(folder)[:-keep_last]:
        if checkpoint.step != best_step:
            shutil.rmtree(checkpoint.folder)
