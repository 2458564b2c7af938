"""Save twice, damage what the second process wrote last, and say what each process would resume from: `... FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from minnow.model.transformer import CausalLM
from minnow.training.checkpoint import newest_valid
from minnow.training.distribution import first_goes_first, is_first, process_group
from minnow.training.parallel import parallelise

from ..helpers import SHAPE, make_trainer
from ..test_faults import flip_a_bit

if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(cuda=False):
        model = CausalLM(SHAPE, seed=1)
        parallelise(model, "fsdp", torch.device("cpu"))
        trainer = make_trainer(Path(sys.argv[1]), model=model)
        for _ in range(2):
            trainer.train_step()
            trainer._save()
        trainer.writer.wait()
        with first_goes_first():
            if is_first():
                flip_a_bit(trainer.checkpoints / "step-00000002", "shard-00002-*")
        chosen, passed_over = newest_valid(trainer.checkpoints)
        assert chosen is not None
        print(json.dumps([chosen.step, passed_over]))
