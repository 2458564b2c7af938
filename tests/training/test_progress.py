"""What a person sees of a run while it goes: loss, tokens/s and the time left, on a terminal and in a log file."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from minnow.training import observer, progress
from minnow.training.metrics_log import METRICS, MetricsLog
from minnow.training.observer import Observer
from minnow.training.progress import TrainingProgress
from minnow.training.speed import Speedometer

from .helpers import make_trainer


def test_without_a_terminal_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    console = Console(file=io.StringIO(), width=100)
    with TrainingProgress("sft", done=10, total=20, console=console) as shown:
        for step in range(11, 21):
            clock[0] += 20.0
            shown.update(step, f"loss {step}")
    # 20 seconds a step, of which 9 are left after the first, 7 after the third: every second one is due.
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "sft 11/20 loss 11 ETA 180s",
        "sft 13/20 loss 13 ETA 140s",
        "sft 15/20 loss 15 ETA 100s",
        "sft 17/20 loss 17 ETA 60s",
        "sft 19/20 loss 19 ETA 20s",
        "sft 20/20 loss 20 ETA 0s",
    ]


def test_on_a_terminal_a_bar_with_loss_speed_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    monkeypatch.setattr(observer, "TrainingProgress", lambda *words, **settings: _on(terminal, *words, **settings))
    watching = Observer(
        make_trainer(tmp_path).config, tmp_path, MetricsLog(tmp_path / METRICS),
        title="pretrain", device=torch.device("cpu"), done=0, total=4,
    )  # fmt: skip
    with watching:
        for step in (1, 2, 3, 4):
            watching.after_step({"step": step, "loss": 2.34567, "tokens_per_second": 12345.6})
    last = [line for line in terminal.file.getvalue().splitlines() if "pretrain" in line][-1]  # type: ignore[attr-defined]
    assert "4/4 loss 2.346  12,346 tok/s" in last
    assert "ETA 0:00:00" in last


def _on(console: Console, title: str, *, done: int, total: int) -> TrainingProgress:
    return TrainingProgress(title, done=done, total=total, console=console)


def test_the_figures_of_the_machine_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 tokens in 4 s; 8e9 operations in them of 1e10 that were possible; 25 more such steps."""
    figures = Speedometer(torch.device("cpu"), peak=2.5e9).figures(seconds=4.0, tokens=1000, flops=8e9, steps_left=25)
    assert figures.pop("memory_gb") > 0.01
    assert figures == {"tokens_per_second": 250.0, "mfu": pytest.approx(0.8), "eta_seconds": 100.0, "seconds": 4.0}
    monkeypatch.setattr("minnow.training.speed.world_size", lambda: 4)  # each has a peak of its own
    figures = Speedometer(torch.device("cpu"), peak=2.5e9).figures(seconds=4.0, tokens=1000, flops=8e9, steps_left=25)
    assert figures["mfu"] == pytest.approx(0.2)
