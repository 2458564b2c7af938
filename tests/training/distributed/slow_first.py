"""A checkpoint whose first process is slow to begin it: `... slow_first FOLDER`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from minnow.model.transformer import CausalLM
from minnow.training.distribution import is_first, process_group
from minnow.training.parallel import parallelise

from ..helpers import SHAPE, make_trainer

make_folder = Path.mkdir


def make_folder_late(path: Path, *arguments: Any, **settings: Any) -> None:
    time.sleep(1)
    make_folder(path, *arguments, **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(cuda=False):
        model = CausalLM(SHAPE, seed=1)
        parallelise(model, "ddp", torch.device("cpu"))
        trainer = make_trainer(Path(sys.argv[1]), model=model)
        if is_first():
            Path.mkdir = make_folder_late  # type: ignore[method-assign]
        trainer._save()
        trainer.writer.wait()
