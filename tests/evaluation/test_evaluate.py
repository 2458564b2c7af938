"""What becomes of a task's scores: figures, counts, the table and the files; and which rows `max_rows` draws."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from minnow.config import UserError
from minnow.evaluation.evaluate import TaskResult, evaluate, show, write_results, write_rows
from minnow.evaluation.registry import Score, Task
from minnow.evaluation.statistics import Interval


class Marks(Task[int]):
    """Row n is worth n, and every third row weighs nothing; small and large ones are different figures."""

    name = "marks"
    unit = "marks"

    def __init__(self, count: int) -> None:
        self.count = count

    def rows(self):
        return range(self.count)

    def figure(self, row):
        return "small" if row < self.count // 2 else "large"

    def score_rows(self, subject, rows):
        return [Score(float(row), float(row % 3 > 0), {"said": f"n {row} 池"}) for row in rows]

    def error_bar(self, scores):
        values = [score.value for score in scores]
        return Interval(sum(values), min(values), max(values))


def examined(count: int, max_rows: int | None = None) -> TaskResult:
    (result,) = evaluate(None, None, [Marks(count)], max_rows=max_rows)  # type: ignore[arg-type]
    return result


def test_so_many_rows_are_drawn_and_always_the_same_ones() -> None:
    """The first ones would all be of one language, or of one kind of question."""
    some = examined(100, max_rows=10)
    assert len(some.rows) == 10
    assert set(some.figures) == {"small", "large"}
    assert examined(100, max_rows=10).rows == some.rows
    for enough in (None, 6, 7):
        assert [row["value"] for row in examined(6, max_rows=enough).rows] == [0, 1, 2, 3, 4, 5]


def test_rows_that_weigh_nothing_are_not_counted() -> None:
    assert examined(6).counts == {"small": 2, "large": 2}  # 0 and 3 are left out


def test_an_examination_without_rows_is_refused() -> None:
    """As of a pond that holds out no creature: an empty table would pass for a success."""
    with pytest.raises(UserError, match="marks: there is not one row"):
        examined(0)


def test_the_files_say_what_was_found(tmp_path) -> None:
    result = examined(6)
    write_results(tmp_path / "figures.json", "runs/toy", [result])
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["model"] == "runs/toy"
    assert written["tasks"]["marks"]["unit"] == "marks"
    assert written["tasks"]["marks"]["figures"] == {
        "small": {"value": 3.0, "low": 0.0, "high": 2.0, "rows": 2},
        "large": {"value": 12.0, "low": 3.0, "high": 5.0, "rows": 2},
    }
    write_rows(tmp_path / "rows.jsonl", [result])
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6
    assert json.loads(lines[3]) == {"task": "marks", "figure": "large", "value": 3.0, "weight": 0.0, "said": "n 3 池"}
    assert "池" in lines[3], "a person reads it"


def test_half_a_surrogate_pair_is_written_as_it_came(tmp_path) -> None:
    result = TaskResult("t", "share", {}, {}, 0.0, [{"prompt": "a \ud83d"}])
    write_rows(tmp_path / "rows.jsonl", [result])
    assert json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8")) == {"prompt": "a \ud83d"}


def test_shares_are_shown_as_percentages_and_other_units_as_they_are() -> None:
    bar = Interval(0.25, 0.125, 0.75)
    results = [TaskResult(unit, unit, {"x/en": bar}, {"x/en": 1234}, 1.0, []) for unit in ("share", "bits per byte")]
    console = Console(width=120, file=io.StringIO())
    show(results, console)
    share, bits = (re.split(r"  +", line.strip()) for line in console.file.getvalue().splitlines()[1:])
    assert share == ["share", "x/en", "25.0%", "12.5% to 75.0%", "1,234"]
    assert bits == ["bits per byte", "x/en", "0.2500", "0.1250 to 0.7500", "1,234"]


def test_the_longest_line_fits_an_ordinary_terminal() -> None:
    name = "exact_match_unseen_wording/en"
    console = Console(width=80, file=io.StringIO())
    show([TaskResult("long-context", "share", {name: Interval(0.98, 0.975, 1)}, {name: 12345}, 1.0, [])], console)
    assert re.split(r"  +", console.file.getvalue().splitlines()[1].strip())[1:3] == [name, "98.0%"]
