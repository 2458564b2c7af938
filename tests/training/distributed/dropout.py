"""Train adapters with dropout, stop half-way and go on: `python -m ...distributed.dropout WORLD OUT MODE`.

Each process leaves the masks it has drawn; the first one the models of the whole run and of the one that went on.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minnow.model import lora
from minnow.stages import language_model
from minnow.training.distribution import is_first, process_group, rank, sum_over_ranks

from .stages import STAGES, train_stage


def main(world: Path, out: Path, mode: str) -> None:
    """Train 4 updates; then again from the checkpoint after 2."""
    language_model.write_report = lambda folder: folder
    command, settings = STAGES["lora"]
    STAGES["dropout"] = command, settings | {"lora.dropout": 0.5, "training.steps": 4, "training.validate_every": 2}
    masks: list[list[bool]] = []

    def noted(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        y = F.dropout(x, p, training)
        if training:
            masks.append((y == 0).flatten()[:64].tolist())
        return y

    class Functional:
        dropout = staticmethod(noted)

        def __getattr__(self, name: str) -> Any:
            return getattr(F, name)

    lora.F = Functional()  # type: ignore[assignment]
    run = out / "run"
    train_stage("dropout", mode, world, run)
    if is_first():
        (run / "model").rename(out / "whole")
        shutil.rmtree(run / "checkpoints" / "step-00000004")
    sum_over_ranks([0.0])  # the others come when that is done
    train_stage("dropout", mode, world, run)
    (out / f"masks-{rank()}.json").write_text(json.dumps(masks))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(cuda=False):
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
