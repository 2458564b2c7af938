"""All processes but one fall silent, and are given up: `python -m tests.training.distributed.silent MODE FOLDER`."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from minnow.model.transformer import CausalLM
from minnow.training.distribution import is_first, process_group
from minnow.training.parallel import parallelise

from ..helpers import SHAPE, make_trainer, masked_batch

TIMEOUT = timedelta(seconds=5)


def main(mode: str, folder: Path) -> None:
    """All make an update; then only the first one takes a batch through its model."""
    model = CausalLM(SHAPE, seed=1)
    if is_first():
        time.sleep(TIMEOUT.total_seconds() + 1)  # it made or read a large one: no update is late yet
    parallelise(model, mode, torch.device("cpu"), TIMEOUT)  # type: ignore[arg-type]
    trainer = make_trainer(folder / os.environ["RANK"], model=model)
    trainer.train_step()
    if is_first():
        with pytest.raises(RuntimeError, match="Timed out waiting 5000ms"):
            trainer.objective(model, masked_batch(1)).loss_sum.backward()
        (folder / "given-up").touch()
    while not (folder / "given-up").exists():
        time.sleep(0.05)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(cuda=False):
        main(sys.argv[1], Path(sys.argv[2]))
