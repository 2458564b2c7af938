"""What a pass over rows tells its user: how far it is, and which rows are bad."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

NUM_SHOWN = 20
"""Bad rows that are shown; the rest is counted."""


def complaint(located: list[str], count: int, rows: int, option: str = "--data.on_bad_row") -> str:
    """Say which of `rows` rows are bad (FILE:LINE: what is wrong, of the first), how many, and what to do:
    `option` is what the command at hand calls it."""
    shown = f", the first {NUM_SHOWN} are shown" if count > NUM_SHOWN else ""
    plural = "row is" if count == 1 else "rows are"
    remedy = f"nothing was done; mend the data, or leave such rows out with {option} skip"
    return "\n".join([*located, f"{count} of {rows} {plural} bad{shown}: {remedy}"])


@contextmanager
def progress_bar(show: bool, what: str, total: int | None, done: int = 0) -> Iterator[Any]:
    """Give a function that advances the bar; with `total` in bytes of text it shows speed and time left."""
    if not show:
        yield lambda amount: None
        return
    from rich import progress

    columns: Iterable[Any] = [progress.TextColumn(what), progress.BarColumn()]
    if total is None:
        columns = [*columns, progress.MofNCompleteColumn(), progress.TimeElapsedColumn()]
    else:
        columns = [*columns, progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn()]
    with progress.Progress(*columns) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda amount: bar.advance(task, amount)
