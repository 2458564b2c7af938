"""Continue the run in FOLDER to step UNTIL with the processes at hand: `... elastic FOLDER MODE UNTIL`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from minnow.model.pretrained import save_pretrained
from minnow.model.transformer import CausalLM
from minnow.training.config import Parallel
from minnow.training.distribution import process_group
from minnow.training.parallel import parallelise

from ..helpers import SHAPE, RandomSource, make_trainer


def continue_run(folder: Path, mode: Parallel, until: int) -> None:
    """Resume, train to step `until` of 20, save a checkpoint and the whole model."""
    model = CausalLM(SHAPE, seed=1).double()
    model.compute_dtype = torch.float64
    parallelise(model, mode, torch.device("cpu"))
    trainer = make_trainer(folder, steps=20, source=RandomSource(4), model=model)
    trainer.resume()
    while trainer.state.step < until:
        trainer.train_step()
    trainer._save()
    trainer.writer.wait()
    save_pretrained(model, folder / "model")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(cuda=False):
        for leg in sys.argv[1:]:  # FOLDER:MODE:UNTIL
            place, how, last = leg.split(":")
            continue_run(Path(place), how, int(last))  # type: ignore[arg-type]
