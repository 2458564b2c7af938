"""A run goes on with other numbers of processes, in other ways of sharing the model, from the same checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .elastic import continue_run
from .processes import run_processes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_close(left: Path, right: Path, tolerance: float) -> None:
    for name, weight in weights(left).items():
        assert float((weight - weights(right)[name]).abs().max()) <= tolerance, name


def legs(processes: int, *parts: tuple[Path, str, int]) -> None:
    words = [f"{folder}:{mode}:{until}" for folder, mode, until in parts]
    run_processes("tests.training.distributed.elastic", *words, world_size=processes)


def test_one_to_two_to_one_process_and_bitwise_on_the_same_two(tmp_path: Path) -> None:
    continue_run(tmp_path / "straight", "auto", 20)
    continue_run(tmp_path / "moving", "auto", 5)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    legs(2, (tmp_path / "moving", "fsdp", 10), (broken, "fsdp", 9), (broken, "fsdp", 20), (whole, "fsdp", 20))
    continue_run(tmp_path / "moving", "auto", 20)
    assert_close(tmp_path / "straight", tmp_path / "moving", 1e-6)
    assert_close(whole, broken, 0.0)


@pytest.mark.slow
def test_one_to_two_to_four_to_one(tmp_path: Path) -> None:
    continue_run(tmp_path / "straight", "auto", 20)
    continue_run(tmp_path / "moving", "auto", 5)
    legs(2, (tmp_path / "moving", "ddp", 10))
    legs(4, (tmp_path / "moving", "hsdp", 15))
    continue_run(tmp_path / "moving", "auto", 20)
    assert_close(tmp_path / "straight", tmp_path / "moving", 1e-6)
