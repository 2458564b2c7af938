"""A run's logs, metrics.jsonl and rollouts.jsonl: written as it happens, read back while they grow."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from minnow.disk import atomic_write, told_when_full
from minnow.json_file import json_text

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"

Record = dict[str, Any]


class MetricsLog:
    """One JSON object a line, written as it happens: `metrics.jsonl`, and the logs of rollouts and of own answers.

    Every line carries `step`: in `metrics.jsonl` and `answers.jsonl` the number of updates done, in `rollouts.jsonl`
    the phase. In `metrics.jsonl` a training line has `loss`, a validation line `validation_loss`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Record) -> None:
        """Add one line and hand it to the operating system at once. Non-finite numbers become null (JSON has none).

        DiskFull when the disk does not take it.
        """
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with told_when_full(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json_text(clean) + "\n")

    def read(self) -> list[Record]:
        """Return all whole lines; a last line that a kill cut short is left out.

        Split as bytes: what a model said may hold signs that end a line of text, such as U+2028.
        """
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_bytes().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # no JSON, or the beginning of a character
                break
        return records

    def rewind(self, step: int) -> None:
        """Forget what a run wrote after the checkpoint of `step`, which the resumed run will write again.

        The checkpoint was saved after the step's training line and before its validation.
        """
        kept = [r for r in self.read() if r["step"] < step or (r["step"] == step and "loss" in r)]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json_text(r) + "\n" for r in kept), encoding="utf-8")


class LogFollower:
    """Reads a log while another process, or another part of this one, writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.from_start = True
        """Whether the last `read` began at the start: the log is new, or a resumed run has rewound it."""
        self._inode, self._offset = 0, 0

    def read(self) -> list[Record]:
        """Return the whole lines that were added since the last call; of a log that was rewritten, all of them."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - closed by the block below
        except FileNotFoundError:
            self.from_start, self._inode, self._offset = True, 0, 0
            return []
        with file:
            status = os.fstat(file.fileno())
            self.from_start = status.st_ino != self._inode or status.st_size < self._offset
            if self.from_start:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole + newline)
        return [json.loads(line) for line in whole.splitlines()]
