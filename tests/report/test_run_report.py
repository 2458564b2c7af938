"""`report.html`: the figures of its tables, from logs whose figures are known."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

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


def test_the_table_of_a_run_on_pairs(tmp_path: Path) -> None:
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
