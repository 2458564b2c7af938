"""Everything that looks on while a run trains: log, trackers, progress, heartbeat, stall detector, profiler.

None of it changes what is learnt.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from minnow.training.config import TrainingConfig
from minnow.training.distribution import is_first, rank
from minnow.training.heartbeat import Heartbeat, StallDetector, State
from minnow.training.metrics_log import MetricsLog, Record
from minnow.training.profile import StepProfiler
from minnow.training.progress import TrainingProgress
from minnow.training.signals import Interrupted
from minnow.training.tracking import Tracking


class Observer:
    """A context around the loop, which tells it what happens.

    Every process has one: each watches itself for stalls and is profiled; the first one alone writes and shows.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: Path,
        metrics: MetricsLog,
        *,
        title: str,
        device: torch.device,
        done: int,
        total: int,
    ) -> None:
        self.config, self.folder, self.metrics = config, folder, metrics
        self.step, self.total = done, total
        self.progress = TrainingProgress(title, done=done, total=total)
        self.heartbeat = Heartbeat(folder, total_steps=total, stall_seconds=config.stall_seconds)
        self.stalls = StallDetector(config.stall_seconds, folder, rank())
        self.profiler = StepProfiler(folder, rank(), device, self.say) if config.profile else None

    def __enter__(self) -> Self:
        """Begin. UserError when a tracker cannot be opened."""
        self.tracking = Tracking(self.config.track if is_first() else (), self.folder, self.say)
        with ExitStack() as stack:
            stack.enter_context(self.progress)
            stack.enter_context(self.stalls)
            if self.profiler is not None:
                stack.enter_context(self.profiler)
            self._open = stack.pop_all()
        self.alive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        state: State = "trained" if error is None else "failed"
        if isinstance(error, Interrupted | KeyboardInterrupt):
            state = "stopped"
        self.tracking.finish(error.code if isinstance(error, Interrupted) else int(error is not None))
        self._beat(state)

    def after_step(self, record: Record) -> None:
        """An update is done; its line goes into the log every `log_every` updates, and that of the last one."""
        self.step = record["step"]
        if self.profiler is not None:
            self.profiler.step()
        self.alive()
        self.progress.update(self.step, f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tok/s")
        if self.step % self.config.log_every == 0 or self.step == self.total:
            self.log(record)

    def alive(self) -> None:
        """Something that takes long is done."""
        self.stalls.beat(self.step)
        self._beat("training")

    def log(self, record: Record) -> None:
        """Write a line into the log, and from there to the trackers. DiskFull when there is no room for it."""
        if not is_first():
            return
        self.metrics.append(record)
        self.tracking.update()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.progress.say(text)

    def _beat(self, state: State) -> None:
        if is_first():
            self.heartbeat.beat(self.step, state)
