"""The GPU check runs whole on a CPU, and tells what failed instead of stopping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gpu_sections import Options, Row
from rich.console import Console

import gpu


def test_every_section_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    code = gpu.main(["--device", "cpu", "--tiny", "--full", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert code == 0, [row for row in rows if row["good"] is False]
    assert {row["section"] for row in rows} == set(gpu.SECTIONS)
    figures = {row["what"]: row for row in rows}
    assert figures["fp32 greedy answers as transformers'"]["figure"] == 4
    assert figures["float32 gradients, packed against alone"]["good"] is True
    assert figures["tiny eager, MFU"]["figure"] > 0
    assert figures["0.33 B tokens, all trained"]["figure"] > 0
    assert "minnow on this device" in capsys.readouterr().out


def test_what_fails_is_a_row_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: Options):  # type: ignore[no-untyped-def]
        yield Row("broken", "before", "1", 1.0)
        raise torch.OutOfMemoryError("CUDA out of memory.\nand much more")

    def fine(options: Options):  # type: ignore[no-untyped-def]
        yield Row("fine", "figure", "2", 2.0, good=True)

    monkeypatch.setattr(gpu, "SECTIONS", {"broken": broken, "fine": fine})
    rows = gpu.measure(Options(torch.device("cpu")), ["broken", "fine"], Console(quiet=True))
    assert [(row.section, row.what, row.good) for row in rows] == [
        ("broken", "before", None), ("broken", "failed", False), ("broken", "seconds", None),
        ("fine", "figure", True), ("fine", "seconds", None),
    ]  # fmt: skip
    assert rows[1].shown == "OutOfMemoryError: CUDA out of memory."
    assert gpu.table_of(rows).row_count == 5


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "correctness,sped"])
