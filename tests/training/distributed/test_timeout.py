"""Processes wait for each other as long as they are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from minnow.config import UserError
from minnow.training.config import TrainingConfig

from .processes import run_processes


@pytest.mark.parametrize(
    ("mode", "processes"),
    [("ddp", 2), pytest.param("hsdp", 4, marks=pytest.mark.slow)],  # two hosts of two: groups that hsdp makes itself
)
def test_a_silent_process_is_given_up(mode: str, processes: int, tmp_path: Path) -> None:
    """And not sooner than while they train: the first one is longer about its model than they then wait."""
    words = (mode, str(tmp_path))
    run_processes("tests.training.distributed.silent", *words, world_size=processes, local_world_size=2)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 604_801])
def test_a_timeout_is_a_time(seconds: float) -> None:
    with pytest.raises(UserError, match=r"training.ddp_timeout is .*: it is a time in seconds"):
        TrainingConfig(ddp_timeout=seconds)
