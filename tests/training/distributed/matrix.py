"""Train every case of the matrix in the processes of this run: `python -m tests.training.distributed.matrix FOLDER`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from minnow.model.checkpointing import GradientCheckpointing
from minnow.model.experts_config import ExpertsConfig
from minnow.model.pretrained import save_pretrained
from minnow.model.slices import whole
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig
from minnow.training.config import Parallel
from minnow.training.distribution import is_first, process_group, rank
from minnow.training.parallel import parallelise
from minnow.training.validation import validate

from ..helpers import SHAPE, RandomSource, make_trainer, masked_batch

STEPS = 20


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to train the same model on the same global batches."""

    optimizer: str = "muon"
    learning_rate: float = 0.003
    dtype: torch.dtype = torch.float64
    pieces: int = 4  # micro-batches in one process; several processes have fewer each
    tied: bool = True
    intermediate_size: int = 48
    gradient_checkpointing: GradientCheckpointing = "off"
    experts: ExpertsConfig | None = None


# float64: Muon lifts the rounding of a sum over processes to visible size in directions without gradient, and AdamW
# does in its first steps; in float64 what is left is a difference in what is computed.
CASES = {
    "muon": Case(),
    "adamw": Case(optimizer="adamw"),
    "one micro-batch": Case(pieces=1),
    # Of the 5 rows of a matrix two processes have 3 and 2, four processes 2, 2, 1 and none.
    "untied, uneven": Case(tied=False, intermediate_size=5),
    "recomputed": Case(gradient_checkpointing="full"),
    # Three experts, shaped like k_proj: of two processes one has a slice of two, of four processes one has none.
    "experts": Case(experts=ExpertsConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16)),
    "fp32": Case(optimizer="adamw", dtype=torch.float32, learning_rate=0.0003),
}


def train_case(case: Case, mode: Parallel, folder: Path) -> None:
    """Train STEPS updates; leave losses, norms, validation and the whole weights in `folder`."""
    changes = {"tie_word_embeddings": case.tied, "intermediate_size": case.intermediate_size, "experts": case.experts}
    shape = dataclasses.replace(SHAPE, **changes)  # type: ignore[arg-type]
    if rank() == 0:
        model = CausalLM(shape, seed=1)
    else:
        with torch.device("meta"):  # only the first process draws weights
            model = CausalLM(shape, seed=1)
    model.to(case.dtype)
    model.compute_dtype = case.dtype
    model.gradient_checkpointing = case.gradient_checkpointing
    parallelise(model, mode, torch.device("cpu"))
    trainer = make_trainer(
        folder / "run",
        steps=STEPS,
        source=RandomSource(case.pieces),
        model=model,
        optim=OptimConfig(optimizer=case.optimizer, matrix_lr=case.learning_rate, eps=1e-6),  # type: ignore[arg-type]
    )
    records = [trainer.train_step() for _ in range(STEPS)]
    held_out = [masked_batch(90_000 + number) for number in range(3)]  # does not divide by the processes
    final = dataclasses.asdict(validate(model, held_out, np.arange(SHAPE.vocab_size) % 4, torch.device("cpu")))
    weights = {name: whole(tensor).detach().contiguous() for name, tensor in model.state_dict().items()}
    save_pretrained(model, folder / "model")
    if is_first():
        save_file(weights, folder / "weights.safetensors")
        (folder / "records.json").write_text(json.dumps([*records, final]))


def main(folder: Path, modes: list[Parallel]) -> None:
    """Every case in every mode."""
    for mode in modes:
        for name, case in CASES.items():
            (folder / mode / name).mkdir(parents=True, exist_ok=True)
            train_case(case, mode, folder / mode / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(cuda=False):
        main(Path(sys.argv[1]), sys.argv[2].split(","))  # type: ignore[arg-type]
