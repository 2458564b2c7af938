"""Every process's files are sealed, each process looks at some of them, and all take the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from .processes import run_processes


def test_a_damaged_shard_of_another_process_is_seen_by_all(tmp_path: Path) -> None:
    for said in run_processes("tests.training.distributed.damaged", str(tmp_path), world_size=2):
        step, (why,) = json.loads(said.splitlines()[-1])
        assert step == 1
        assert why.startswith("step-00000002: shard-00002-")
        assert why.endswith("is not what was written (its sha256 differs)")
