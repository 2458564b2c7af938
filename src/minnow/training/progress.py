"""Progress a person can read: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from minnow.console import plain_console

SECONDS_BETWEEN_LINES = 30.0


class TrainingProgress:
    """A bar with loss, tokens/s and ETA; without a terminal, a line every 30 seconds and one at the end."""

    def __init__(self, title: str, *, done: int, total: int, console: Console | None = None) -> None:
        self.console = console or plain_console(stderr=True)
        self.title, self.total = title, total
        self.started_at, self.started_step = time.monotonic(), done
        self.last_line = 0.0
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=total, completed=done, status="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, step: int, status: str) -> None:
        """Show that `step` updates are done."""
        self.bar.update(self.task, completed=step, status=status)
        if self.console.is_terminal:
            return
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES or step == self.total:
            self.last_line = now
            rate = (now - self.started_at) / max(step - self.started_step, 1)
            eta = (self.total - step) * rate
            self.console.print(f"{self.title} {step}/{self.total} {status} ETA {eta:.0f}s")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(text, soft_wrap=True)
