"""A model that looks at pictures on two processes, by DDP and in slices, learns what one process teaches it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minnow.data.batches import Share
from minnow.data.prepare import DataConfig, prepare
from minnow.stages import language_model
from minnow.tokenizer import Tokenizer
from minnow.training.objective import PackedBatches
from tests.training.seeing import mixed, seeing_model, write_rows

from .processes import run_processes
from .seeing import main

PARTS = ("all", "language", "projector")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    seeing_model(folder / "start")
    write_rows(folder / "rows.jsonl", mixed(60))
    words = (str(folder), str(folder), "ddp,fsdp", *PARTS)
    run_processes("tests.training.distributed.seeing", *words, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "write_report", None)  # `main` sets it: put back afterwards
        main(folder, folder, ["auto"], list(PARTS))
    return folder


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(world: Path, mode: str, part: str) -> None:
    alone, two = world / "auto" / part, world / mode / part
    expected, got = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, two)
    )
    assert len([record for record in expected if "loss" in record]) == 10
    for one, other in zip(expected, got, strict=True):
        for key in {"loss", "validation_loss", "grad_norm"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), f"{key} of step {one['step']}"
    weights, others = (load_file(run / "model" / "model.safetensors") for run in (alone, two))
    start = load_file(world / "start" / "model.safetensors")
    learnt = {"projector": "multi_modal_projector", "language": "language_model", "all": "vision_tower"}[part]
    assert any(not start[name].equal(weight) for name, weight in weights.items() if name.startswith(learnt))
    for name, weight in weights.items():
        difference = float((weight - others[name]).abs().max())
        assert difference <= 1e-5, f"{name} differs by {difference:.1e}"


def test_the_batches_of_the_runs_are_uneven(world: Path) -> None:
    """Else the test above would miss a process that waits for another's gradient."""
    config = DataConfig(paths=(str(world / "rows.jsonl"),), cache_dir=str(world / "cache"), validation_fraction=0.2)
    rows, _ = prepare(config, Tokenizer.from_pretrained(world / "start"), "sft", sequence_length=64).packed(64, 0)
    source = PackedBatches(rows, 0, rows_per_batch=4, rows_per_micro_batch=1)
    shown = [
        [[batch.pixels_ICHW is not None for batch in source.micro_batches(step, Share(rank, 2))] for rank in (0, 1)]
        for step in range(10)
    ]
    assert any(first != second for one, other in shown for first, second in zip(one, other, strict=True))
