"""Every stage on several processes, by DDP and in slices, trains what one process trains: losses and final weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .processes import run_processes
from .stages import STAGES, main, write_world

QUICK = ("softmax experts", "lora", "dpo", "grpo")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def processes(world: Path, number: int, modes: str, names: Iterable[str]) -> Path:
    """Train the stages in `number` processes, on two hosts if there are four."""
    out = world / f"{number} {modes}"
    words = (str(world), str(out), modes, *names)
    module = "tests.training.distributed.stages"
    run_processes(module, *words, world_size=number, local_world_size=2, timeout=1500)
    return out


@pytest.fixture(scope="module")
def slices(world: Path) -> Path:
    return processes(world, 2, "fsdp", QUICK)


@pytest.fixture(scope="module")
def pair(world: Path) -> Path:
    return processes(world, 2, "ddp,fsdp", STAGES)


@pytest.fixture(scope="module")
def four(world: Path) -> Path:
    return processes(world, 4, "ddp,fsdp,hsdp", STAGES)


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_train_in_slices_what_one_trains(world: Path, slices: Path, name: str) -> None:
    assert_same(alone(world, name), slices / "fsdp" / name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(world: Path, pair: Path, mode: str, name: str) -> None:
    assert_same(alone(world, name), pair / mode / name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_four_processes_train_what_one_trains(world: Path, four: Path, mode: str, name: str) -> None:
    assert_same(alone(world, name), four / mode / name)


def alone(world: Path, name: str) -> Path:
    """The run of one process: this one."""
    run = world / "alone" / "auto" / name
    if not run.exists():
        with pytest.MonkeyPatch.context() as patch:
            for stage in ("language_model", "rl"):
                patch.setattr(f"minnow.stages.{stage}.write_report", None)  # `main` sets it: put back afterwards
            main(world, world / "alone", ["auto"], [name])
    return run


def assert_same(left: Path, right: Path) -> None:
    expected, got = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (left, right)
    )
    assert len([record for record in expected if "loss" in record]) == 20
    for one, other in zip(expected, got, strict=True):
        assert one["step"] == other["step"]
        for key in [key for key in one if key in ("loss", "validation_loss") or key.startswith("held_out/")]:
            assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), f"{key} of step {one['step']}"
    (file,) = {path.name for path in (left / "model").glob("*model.safetensors")}
    weights, others = load_file(left / "model" / file), load_file(right / "model" / file)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        difference = float((weight - others[name]).abs().max())
        assert difference <= 1e-5, f"{name} differs by {difference:.1e}"
