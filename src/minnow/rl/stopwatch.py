"""Where a run's time goes: seconds by the kind of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the seconds of each kind of work until they are taken."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Count the block's time as `name`. Blocks lie beside each other, not in each other."""
        start = self._clock()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Return what has been counted since the last call, as `seconds_NAME`, and start again from nothing."""
        taken, self._seconds = self._seconds, {}
        return {f"seconds_{name}": seconds for name, seconds in taken.items()}
