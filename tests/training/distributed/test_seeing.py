"""A model that looks at pictures on two processes, by DDP and in slices, learns what one process teaches it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minnow.stages import language_model
from tests.training.seeing import seeing_model

from .processes import run_processes
from .seeing import main, pack_data

PARTS = ("all", "language", "projector")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    start = seeing_model(folder / "start")
    words = (str(start), str(folder), "ddp,fsdp", *PARTS)
    run_processes("tests.training.distributed.seeing", *words, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pack_data", "write_report"):
            patch.setattr(language_model, name, None)  # `main` sets them: put back afterwards
        main(start, folder, ["auto"], list(PARTS))
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


def test_the_batches_of_the_runs_are_uneven() -> None:
    """Else the test above would miss a process that waits for another's gradient."""
    from minnow.data.batches import Share
    from minnow.training.objective import PackedBatches
    from tests.training.seeing import seeing

    rows = pack_data(None, seeing()[1], "sft", None).train
    source = PackedBatches(rows, 0, rows_per_batch=4, rows_per_micro_batch=1)
    shown = [
        tuple(batch.pixels_ICHW is not None for rank in (0, 1) for batch in source.micro_batches(step, Share(rank, 2)))
        for step in range(10)
    ]
    assert any(first != second for a, b, c, d in shown for first, second in ((a, c), (b, d)))
