"""`minnow vlm` in the processes of this run: `python -m ...distributed.seeing WORLD OUT MODE,MODE PART ...`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from minnow.config import parse_config
from minnow.stages import language_model, vlm
from minnow.training.distribution import process_group
from tests.training.distributed.stages import COMMON

# Rows with none, one and two pictures, one row at a time: often one process sees some and the other none.
SETTINGS = COMMON | {"sequence_length": 64, "training.batch_tokens": 256, "training.micro_batch_tokens": 64}
SETTINGS |= {"training.steps": 10, "training.validate_every": 5, "data.validation_fraction": 0.2}


def main(world: Path, out: Path, modes: list[str], parts: list[str]) -> None:
    """Every part of the model in every mode, without the reports."""
    language_model.write_report = lambda folder: folder  # type: ignore[assignment]
    for mode in modes:
        for part in parts:
            places = {"init_from": world / "start", "run": out / mode / part, "training.parallel": mode, "train": part}
            places |= {"data.paths": world / "rows.jsonl", "data.cache_dir": world / "cache"}
            words = [word for key, value in (SETTINGS | places).items() for word in (f"--{key}", str(value))]
            vlm.run(parse_config(vlm.Config, words, program="minnow vlm"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(cuda=False):
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:])
