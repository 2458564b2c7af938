"""Run tasks on a model; show and keep the results."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minnow.config import UserError
from minnow.disk import atomic_write
from minnow.evaluation.registry import Score, Subject, Task
from minnow.evaluation.statistics import Interval
from minnow.json_file import json_text
from minnow.model.transformer import CausalLM
from minnow.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class TaskResult:
    """Outcome of one task."""

    task: str
    unit: str
    figures: dict[str, Interval]
    counts: dict[str, int]
    """Rows behind each figure: those that weigh something in it."""
    seconds: float
    rows: list[dict[str, Any]]
    """Each row's figure, value, weight and details."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON of the figures, without the rows."""
        return {
            "unit": self.unit,
            "seconds": round(self.seconds, 3),
            "figures": {
                name: {"value": bar.value, "low": bar.low, "high": bar.high, "rows": self.counts[name]}
                for name, bar in self.figures.items()
            },
        }


def evaluate(
    model: CausalLM, tokenizer: Tokenizer, tasks: Sequence[Task[Any]], *, max_rows: int | None = None
) -> list[TaskResult]:
    """Examine `model` in each of `tasks`. `max_rows`, 1 or more, draws so many rows of each, always the same ones.

    UserError where a task has no rows: an empty table would pass for a success.
    """
    subject = Subject(model, tokenizer)
    return [_run(task, subject, max_rows) for task in tasks]


def _run(task: Task[Any], subject: Subject, max_rows: int | None) -> TaskResult:
    rows = list(task.rows())
    if not rows:
        raise UserError(f"{task.name}: there is not one row to examine")
    if max_rows is not None and max_rows < len(rows):
        rows = random.Random(f"evaluation/{task.name}").sample(rows, max_rows)
    start = time.perf_counter()
    scores = task.score_rows(subject, rows)
    seconds = time.perf_counter() - start
    by_figure: dict[str, list[Score]] = {}
    for row, score in zip(rows, scores, strict=True):
        by_figure.setdefault(task.figure(row), []).append(score)
    return TaskResult(
        task=task.name,
        unit=task.unit,
        figures={name: task.error_bar(group) for name, group in by_figure.items()},
        counts={name: sum(score.weight > 0 for score in group) for name, group in by_figure.items()},
        seconds=seconds,
        rows=[
            {"task": task.name, "figure": name, "value": score.value, "weight": score.weight, **score.details}
            for name, group in by_figure.items()
            for score in group
        ],
    )


def show(results: Sequence[TaskResult], console: Console) -> None:
    """Print the figures with their intervals as a table."""
    table = Table("task", "figure", "value", "95% interval", "rows", box=None, pad_edge=False)
    table.columns[1].overflow = "fold"  # a narrow terminal must not cut the language off a figure's name
    for result in results:
        for name, bar in result.figures.items():
            form = "{:.1%}" if result.unit == "share" else "{:.4f}"
            value, low, high = (form.format(number) for number in (bar.value, bar.low, bar.high))
            table.add_row(result.task, name, value, f"{low} to {high}", f"{result.counts[name]:,}")
    console.print(table)


def write_results(path: str | Path, model: str, results: Sequence[TaskResult], *, changed: str = "") -> None:
    """Write the figures as JSON: {"model", "changed", "tasks": {task: {"unit", "seconds", "figures": {name: ...}}}}.

    changed: what was done to the stored model before it was examined, such as "int8"; nothing by default.
    """
    content = {"model": model, "changed": changed, "tasks": {result.task: result.to_dict() for result in results}}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_rows(path: str | Path, results: Sequence[TaskResult]) -> None:
    """Write every row with its answer and score as JSON lines."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for result in results:
            file.writelines(json_text(row) + "\n" for row in result.rows)
