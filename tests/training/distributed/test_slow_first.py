"""The first process makes a checkpoint's folder; the others may be faster, but not ahead of it."""

from __future__ import annotations

from pathlib import Path

from minnow.training.checkpoint import newest_valid

from .processes import run_processes


def test_a_checkpoint_waits_for_the_first_process_to_begin_it(tmp_path: Path) -> None:
    run_processes("tests.training.distributed.slow_first", str(tmp_path), world_size=2)
    checkpoint, passed_over = newest_valid(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 0
    assert not passed_over
    assert {"state.json", "complete.json"} < {path.name for path in checkpoint.folder.iterdir()}
