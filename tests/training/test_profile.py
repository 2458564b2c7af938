"""The profiler's trace and table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from .helpers import make_trainer


def test_three_updates_are_recorded_after_the_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, steps=9, validate_every=0, save_every=0, profile=True).fit()
    with gzip.open(tmp_path / "profile" / "trace-00000.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    # From 0: three updates are skipped, one warms up.
    steps = {name for name in names if str(name).startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"}
    assert "aten::mm" in names
    table = (tmp_path / "profile" / "operators-00000.txt").read_text()
    assert "aten::mm" in table
    said = capsys.readouterr().err
    assert table.splitlines()[3] in said
    assert str(tmp_path / "profile" / "trace-00000.json.gz") in said
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"trace-00000.json.gz", "operators-00000.txt"}


def test_a_run_too_short_for_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, steps=3, validate_every=0, save_every=0, profile=True).fit()
    assert "nothing was recorded, that takes more than 4 updates" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()
