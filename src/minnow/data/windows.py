"""Windows: a few shards at a time. Documents are shuffled and packed within one, and windows follow one another.

So memory does not grow with the data. Of shards that are still being written windows come in the order of the data:
which rows come first then follows from the first shards alone, so that training can start on them, and finds the same
rows when it starts again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from minnow.config import UserError
from minnow.data.job import Job
from minnow.data.journal import Journal
from minnow.data.shards import Shards
from minnow.data.shuffle import permutation
from minnow.json_file import read_json

WINDOW_SHARDS = 16
"""About 100 million tokens: enough to mix, and what is in memory at a time."""

_WINDOWS = 0x3A1D  # keeps the order of shards apart from other shuffles with the same seed
_POLL_SECONDS = 0.2


class Windows(Protocol):
    """The windows of one split, each from 0 on."""

    def window(self, number: int) -> Shards | None:
        """Return the shards of a window, None past the last one. Waits for one that is not there yet."""
        ...

    def lacking(self, number: int) -> str | None:
        """Say what a window waits for; None when it is there, or known not to come."""
        ...


class ShuffledWindows:
    """Windows of shards that are drawn from everywhere; all in one where there are no more than WINDOW_SHARDS."""

    def __init__(self, shards: Shards, seed: int) -> None:
        self.shards = shards
        self._order = permutation(shards.num_shards, seed, _WINDOWS)

    def window(self, number: int) -> Shards | None:
        """See `Windows`."""
        chosen = self._order[number * WINDOW_SHARDS : (number + 1) * WINDOW_SHARDS]
        return self.shards.subset(np.sort(chosen).tolist()) if len(chosen) else None

    def lacking(self, number: int) -> str | None:
        """Nothing: all of it is there."""
        return None


class GrowingShards:
    """The shards of a preparation in the order of training, finished or going on, read as they come."""

    def __init__(self, job: Job, ended_badly: Callable[[], str | None], say: Callable[[str], None]) -> None:
        """ended_badly: asked while there is something to wait for; says why nothing more will come, if so.

        say: told what `window` waits for.
        """
        self.job, self._ended_badly, self._say = job, ended_badly, say
        self._journal = Journal(job.folder, job.lots, job.options.threshold)
        self._walk = self._journal.in_order()
        self._entries: list[Any] = []
        self._verified: set[tuple[int, str]] = set()
        self._whole = False

    def lacking(self, window: int) -> str | None:
        """Say what a window still waits for; None when it is there, or known not to come.

        Raises UserError when the preparation has failed.
        """
        self._look()
        there = len(self._entries) - window * WINDOW_SHARDS
        if self._whole or there >= WINDOW_SHARDS:
            return None
        ended_badly = self._ended_badly()  # asked first: what ends it is in the journal before it ends
        if failure := self._journal.failure():
            raise UserError(f"the preparation of the data has failed: {failure}")
        if ended_badly is not None:
            raise UserError(ended_badly)
        missing, parts = self._journal.missing(), self._journal.num_parts
        who = f", the next is of part {missing[0].number % parts + 1}/{parts}" if parts and missing else ""
        return f"waiting for prepared data: {max(0, there)} of the next {WINDOW_SHARDS} shards are there{who}"

    def window(self, number: int, side: str) -> Shards | None:
        """Return a window's shards of one side, None past the last one. Waits for it.

        UserError naming a file that is not what was written.
        """
        said = None
        while (lacking := self.lacking(number)) is not None:
            if lacking != said:
                self._say(said := lacking)
            time.sleep(_POLL_SECONDS)
        chosen = range(number * WINDOW_SHARDS, min((number + 1) * WINDOW_SHARDS, len(self._entries)))
        if not chosen:
            return None
        meta = self.job.shards_meta([entry[side] for entry in self._entries])
        shards = Shards(self.job.folder / side, meta).subset(chosen)
        if (number, side) not in self._verified:  # written weeks ago, perhaps, by a preparation that broke off
            shards.verify()
            self._verified.add((number, side))
        return shards

    def _look(self) -> None:
        """Take up what has been written since the last look."""
        if self._whole:
            return
        if self.job.done:  # the journal is gone, or about to go
            sides = {}
            for side in ("train", "validation"):
                sides[side] = read_json(self.job.folder / side / "meta.json")["shards"]
            self._entries = [dict(zip(sides, pair, strict=True)) for pair in zip(*sides.values(), strict=True)]
            self._whole = True
            return
        for entry in self._walk:
            if entry is None:
                return
            self._entries.append(entry)


@dataclass(frozen=True)
class GrowingWindows:
    """One side of growing shards, whole or its first window alone."""

    shards: GrowingShards
    side: str
    only_first: bool = False

    def window(self, number: int) -> Shards | None:
        """See `Windows`."""
        return None if self.only_first and number else self.shards.window(number, self.side)

    def lacking(self, number: int) -> str | None:
        """See `Windows`."""
        return None if self.only_first and number else self.shards.lacking(number)
