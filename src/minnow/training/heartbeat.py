"""Signs of life: a small file that the loop writes after its steps, and a thread that notices when they stop.

`minnow watch` and a person read `heartbeat.json`. The stall detector only tells: it prints where every thread stands,
which is what one needs to know of a run that hangs, and leaves the run alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from minnow.disk import DiskFull, atomic_write

HEARTBEAT = "heartbeat.json"
SECONDS_BETWEEN_BEATS = 1.0

State = Literal["training", "trained", "stopped", "failed"]


class Heartbeat:
    """`heartbeat.json`: who trains, how far the run is, and when that was true. At most one write a second."""

    def __init__(self, folder: Path, *, total_steps: int, stall_seconds: float) -> None:
        self.path, self.total_steps, self.stall_seconds = folder / HEARTBEAT, total_steps, stall_seconds
        self._written = -SECONDS_BETWEEN_BEATS

    def beat(self, step: int, state: State = "training") -> None:
        """Say that `step` updates are done; a state other than training is always written."""
        now = time.monotonic()
        if state == "training" and now - self._written < SECONDS_BETWEEN_BEATS:
            return
        self._written = now
        beat = {
            "step": step,
            "total_steps": self.total_steps,
            "state": state,
            "time": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "stall_seconds": self.stall_seconds,
        }
        # A run does not end for want of a sign of life; a disk that is really full ends it at the next line of its log.
        with contextlib.suppress(OSError, DiskFull), atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(beat) + "\n", encoding="utf-8")


class StallDetector:
    """A thread that prints all threads' stacks, once a stall, when `beat` was not called for `seconds`; 0: never.

    The stacks go to stderr and to RUN/stalls/process-NNNNN.txt. Each process of a run watches itself; only the first
    one's stderr is seen. A call that hangs while it holds Python's lock cannot be noticed from inside.
    """

    def __init__(self, seconds: float, folder: Path, process: int) -> None:
        self.seconds, self.process = seconds, process
        self.file = folder / "stalls" / f"process-{process:05d}.txt"
        self._step, self._last = 0, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall detector", daemon=True)

    def __enter__(self) -> Self:
        if self.seconds:
            self._last = time.monotonic()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, step: int) -> None:
        """Say that the loop moves: `step` updates are done."""
        self._step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        told = None  # the beat after which the present stall began, once it has been told
        wait = self.seconds
        while not self._over.wait(wait):
            last = self._last
            wait = last + self.seconds - time.monotonic()
            if wait <= 0:
                wait = self.seconds
                if told != last:
                    told = last
                    self._tell()

    def _tell(self) -> None:
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        text = (
            f"{when}: process {self.process} has not moved on from step {self._step} for {self.seconds:g} s "
            f"(training.stall_seconds); the run goes on. Where its threads stand:\n{_stacks()}\n"
        )
        # stderr first, and nothing needed from the disk before it: that may be what hangs, or full.
        print(text, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(text)


def _stacks() -> str:
    """Where every thread stands, the most recent call first, without the source's lines: those would be read from
    disk."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines: list[str] = []
    for ident, innermost in sys._current_frames().items():
        lines.append(f"Thread {names.get(ident, ident)}:")
        lines += [
            f'  File "{frame.f_code.co_filename}", line {line} in {frame.f_code.co_name}'
            for frame, line in traceback.walk_stack(innermost)
        ]
    return "\n".join(lines)
