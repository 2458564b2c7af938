"""DDP, FSDP2 and HSDP on several processes train what one process trains: same losses, same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .matrix import CASES, train_case
from .processes import run_processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name, case in CASES.items():
        (folder / name).mkdir()
        train_case(case, "auto", folder / name)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    run_processes("tests.training.distributed.matrix", str(folder), "ddp,fsdp", world_size=2)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    arguments = (str(folder), "ddp,fsdp,hsdp")
    run_processes("tests.training.distributed.matrix", *arguments, world_size=4, local_world_size=2)
    return folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(alone: Path, pair: Path, mode: str, name: str) -> None:
    assert_same(alone / name, pair / mode / name, 1e-6 if CASES[name].dtype.itemsize == 8 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_four_processes_train_what_one_trains(alone: Path, four: Path, mode: str, name: str) -> None:
    assert_same(alone / name, four / mode / name, 1e-6 if CASES[name].dtype.itemsize == 8 else 1e-5)


def assert_same(left: Path, right: Path, tolerance: float) -> None:
    expected, got = (json.loads((folder / "records.json").read_text()) for folder in (left, right))
    for step, (one, other) in enumerate(zip(expected, got, strict=True)):
        for key in one.keys() - {"lr"}:
            assert other[key] == pytest.approx(one[key], rel=tolerance), f"{key} of step {step}"
    for file in ("weights.safetensors", "model/model.safetensors"):
        expected_weights, weights = load_file(left / file), load_file(right / file)
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            difference = float((weight - expected_weights[name]).abs().max())
            assert difference <= tolerance, f"{name} differs by {difference:.1e}"
