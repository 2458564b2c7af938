"""`report.html`: the figures of its tables, from logs whose figures are known."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minnow.config import UserError
from minnow.report.lineage import Run, read_records, read_rollouts, stage_folders
from minnow.report.run_report import write_report


def update(step: int, loss: float, speed: float, seconds: float, **more: Any) -> dict[str, Any]:
    figures = {"step": step, "loss": loss, "tokens": 1000 * step, "tokens_per_second": speed, "mfu": speed / 1000}
    return figures | {"seconds": seconds, "memory_gb": 1.5, "lr": 0.1, "grad_norm": 1.0} | more


def table(folder: Path, records: list[dict[str, Any]], **more: Any) -> dict[str, str]:
    """The rows of all tables on the page."""
    folder.mkdir()
    (folder / "config.yaml").write_text("run: x\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = write_report(folder, **more).read_text(encoding="utf-8")
    return {k: html.unescape(v) for k, v in re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page)}


def test_the_table_of_a_run(tmp_path: Path) -> None:
    records = [
        update(1, 3.0, 100.0, 90.0),
        update(2, 2.5, 200.0, 30.0),
        {"step": 2, "validation_loss": 2.75, "bits_per_byte": 1.5},
        update(3, 2.0, 900.0, 60.0),
        {"step": 3, "validation_loss": 2.25, "bits_per_byte": 1.25},
    ]
    assert table(tmp_path / "run", records) == {
        "updates": "3",
        "tokens": "3,000",
        "training loss": "2.0000 nats per token",
        "time in updates": "3.0 minutes",
        "speed (median)": "200 tokens/s",
        "model FLOP utilisation (median)": "20% of the measured matmul peak",
        "peak memory": "1.50 GB",
        "held-out loss": "2.2500 nats per token",
        "held-out bits per byte": "1.2500",
    }


def test_updates_without_a_line_took_time_too(tmp_path: Path) -> None:
    """With log_every 10 a run of 25 minutes was said to have taken three."""
    records = [update(10, 3.0, 100.0, 60.0), update(20, 3.0, 100.0, 60.0), update(25, 3.0, 100.0, 60.0)]
    assert table(tmp_path / "run", records)["time in updates"] == "25.0 minutes"


def test_a_figure_is_found_in_one_pass_over_the_log() -> None:
    """Each line asked again which update was kept: after 20,000 updates card and report took minutes."""

    class Counting(list[dict[str, Any]]):
        passes = 0

        def __iter__(self) -> Iterator[dict[str, Any]]:
            self.passes += 1
            return super().__iter__()

    records = Counting({"step": step, "validation_loss": 1.0, "tokens": step} for step in range(1, 100))
    assert Run(Path(), {"training": {"patience": 2}}, records).last("tokens") == 1
    assert records.passes <= 2


def test_under_patience_the_held_out_loss_is_that_of_the_model_that_was_kept(tmp_path: Path) -> None:
    records = [
        update(1, 3.0, 100.0, 90.0),
        {"step": 1, "validation_loss": 2.25, "bits_per_byte": 1.25},
        update(2, 2.5, 200.0, 30.0),
        {"step": 2, "validation_loss": None, "bits_per_byte": None},
        {"step": 2, "validation_loss": 2.75, "bits_per_byte": 1.5},
    ]
    (tmp_path / "config.yaml").write_text("training:\n  patience: 1\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    found = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page))
    assert found["updates"] == "2"
    assert found["model kept"] == "after update 1, the best one held out (training.patience)"
    assert found["held-out loss"] == "2.2500 nats per token"
    assert found["held-out bits per byte"] == "1.2500"


def test_the_table_of_a_run_on_pairs(drawn: None, tmp_path: Path) -> None:
    records = [
        update(1, 0.7, 100.0, 60.0, accuracy=0.5),
        {"step": 1, "validation_loss": 0.5, "validation_accuracy": 0.625},
    ]
    found = table(tmp_path / "run", records)
    assert found["training loss"] == "0.7000 nats per pair"
    assert found["held-out loss"] == "0.5000 nats per pair"
    assert found["held-out pairs judged right"] == "62.5%"
    assert "held-out bits per byte" not in found


def test_what_a_model_wrote_is_text_on_the_page(tmp_path: Path) -> None:
    said = "<script>alert(1)</script> & more"
    conversation = [{"role": "user", "content": "<b>?"}, {"role": "assistant", "content": said}]
    rows = table(tmp_path / "run", [update(1, 1.0, 1.0, 1.0)], figures={"a": "<b>"}, conversations=[conversation])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert rows["a"] == "<b>"
    assert f'<div class="turn assistant">{html.escape(said)}</div>' in page
    assert "<script" not in page
    assert "<b>" not in page


def test_a_loss_that_is_no_number_does_not_keep_the_page_back(drawn: None, tmp_path: Path) -> None:
    """The log has null for it; a run that trained to its end failed at its report."""
    records = [update(1, 3.0, 100.0, 90.0), {"step": 1, "validation_loss": None, "bits_per_byte": None}]
    found = table(tmp_path / "run", records)
    assert found["held-out loss"] == "not finite"
    assert "held-out bits per byte" not in found


def test_a_log_that_was_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """By a kill, or because the run is just writing: the report works while it goes on."""
    table(tmp_path / "run", [update(1, 3.0, 100.0, 90.0)])
    log = tmp_path / "run" / "metrics.jsonl"
    with log.open("ab") as file:
        file.write('{"step": 2, "said": "池'.encode()[:-1])
    assert [record["step"] for record in read_records(log)] == [1]
    write_report(tmp_path / "run")


def test_a_sample_may_hold_signs_that_end_a_line_of_text(tmp_path: Path) -> None:
    line = json.dumps({"step": 0, "sample": {"text": "one\u2028two\x85three"}}, ensure_ascii=False)
    (tmp_path / "rollouts.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read_rollouts(tmp_path) == [json.loads(line)]


def test_stages_stand_in_the_order_in_which_they_were_made(tmp_path: Path) -> None:
    """Also after something was written into an earlier one, which its own report does."""
    for name in ("pretrain", "annealing"):
        table(tmp_path / name, [update(1, 3.0, 100.0, 90.0)])
    os.utime(tmp_path / "pretrain" / "config.yaml", (1e9, 1e9))
    write_report(tmp_path / "pretrain")
    assert [folder.name for folder in stage_folders(tmp_path)] == ["pretrain", "annealing"]
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["pretrain", "annealing"]


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no metrics.jsonl: give the folder of a training run"):
        write_report(tmp_path)
