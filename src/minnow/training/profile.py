"""`--profile`: what a few updates spend their time on, by torch.profiler."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from minnow.disk import atomic_write

SKIPPED, WARM_UP, RECORDED = 3, 1, 3
"""Updates: the first ones compile and allocate; one runs under the profiler unrecorded, whose start costs time too."""

COSTLIEST = 15
"""Rows of the table."""


class StepProfiler:
    """Records RECORDED updates and writes RUN/profile/trace-NNNNN.json.gz and operators-NNNNN.txt, then costs nothing.

    The trace opens in https://ui.perfetto.dev or chrome://tracing. Each process writes its own; NNNNN is its number.
    """

    def __init__(self, folder: Path, process: int, device: torch.device, say: Callable[[str], None]) -> None:
        self.folder, self.process, self.device, self.say = folder / "profile", process, device, say
        self.is_written = False
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=RECORDED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            acc_events=True,
        )

    def __enter__(self) -> Self:
        self.profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_written:
            self.profile.stop()
        if not self.is_written:
            self.say(f"profile: nothing was recorded, that takes more than {SKIPPED + WARM_UP} updates")

    def step(self) -> None:
        """Say that an update is done."""
        if not self.is_written:
            self.profile.step()
            if self.is_written:
                self.profile.stop()

    def _write(self, done: profile) -> None:
        self.is_written = True
        self.folder.mkdir(exist_ok=True)
        trace = self.folder / f"trace-{self.process:05d}.json.gz"
        with tempfile.TemporaryDirectory() as scratch, atomic_write(trace) as temporary:
            plain = Path(scratch) / "trace.json"
            done.export_chrome_trace(str(plain))
            with open(plain, "rb") as source, gzip.open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
        costly_on = "cuda" if self.device.type == "cuda" else "cpu"
        table = done.key_averages().table(
            sort_by=f"self_{costly_on}_time_total", row_limit=COSTLIEST, max_name_column_width=50
        )
        with atomic_write(self.folder / f"operators-{self.process:05d}.txt") as temporary:
            temporary.write_text(table, encoding="utf-8")
        self.say(table)
        self.say(f"profile: {trace}")
