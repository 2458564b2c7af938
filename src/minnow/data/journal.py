"""What a preparation has finished so far: FOLDER/journal, an entry a shard, each written when its shard is whole.

Processes and machines that share the folder meet here: an entry never changes, so whoever finds one can rely on it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minnow.config import UserError
from minnow.data.encoding import Checked
from minnow.data.lots import Lot, in_order
from minnow.data.progress import NUM_SHOWN
from minnow.disk import atomic_write
from minnow.json_file import json_text


@dataclass(frozen=True)
class Part:
    """The lots that one process does, of several that share the work."""

    number: int = 1
    """From 1."""
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "2/8". Raises UserError."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise UserError(f"--part {text}: give the number of this part and of all parts, such as 2/8")
        return cls(int(number), int(of))

    def owns(self, lot: Lot) -> bool:
        """Whether the lot is this part's; lots are dealt out in turn, so that parts are alike."""
        return lot.number % self.of == self.number - 1


@dataclass
class Tally:
    """What rows came to."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    """FILE:LINE and what is wrong, of the first bad rows."""
    lowest: int = (1 << 64) - 1
    highest: int = 0
    """Extremes of the split hashes."""

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Tally:
        """Back from JSON."""
        return cls(**{**saved, "counts": Counter(saved["counts"])})

    def add(self, other: Checked | Tally, bad: Sequence[str]) -> None:
        """Add what later rows came to; `bad` tells which of them are."""
        self.counts += other.counts
        self.bad = [*self.bad, *bad][:NUM_SHOWN]
        self.lowest, self.highest = min(self.lowest, other.lowest), max(self.highest, other.highest)


class Journal:
    """Entries of the shards of `lots` that were split at `threshold`, or at the one that is remembered here."""

    def __init__(self, folder: Path, lots: Sequence[Lot], threshold: int) -> None:
        self.folder, self.lots = folder / "journal", lots
        self.threshold: int = self._recall("threshold", threshold)
        self._entries: dict[tuple[int, int], dict[str, Any]] = {}

    @property
    def num_parts(self) -> int | None:
        """Into how many parts the work is divided; None when it is not."""
        return self._recall("parts", None)

    def claim_parts(self, number: int) -> None:
        """Divide the work into so many parts. Raises UserError when it is divided otherwise."""
        if self.num_parts not in (None, number):
            raise UserError(
                f"this data is being prepared in {self.num_parts} parts: go on with them (--part I/{self.num_parts}), "
                f"or delete {self.folder.parent} to begin anew"
            )
        self._remember("parts", number)

    def remember_threshold(self, threshold: int) -> None:
        """Split at `threshold` from now on: entries of another one do not count any more."""
        self._remember("threshold", threshold)
        self.threshold = threshold
        self._entries.clear()

    def entry(self, lot: Lot, shard: int) -> dict[str, Any] | None:
        """Return the entry of a shard, None when it is not there."""
        key = (lot.number, shard)
        if key not in self._entries:
            try:
                found = json.loads((self.folder / f"{shard_name(*key)}.json").read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
            if found["threshold"] != self.threshold:
                return None
            self._entries[key] = found
        return self._entries[key]

    def write(self, lot: int, shard: int, last: bool, tally: Tally, sides: Mapping[str, Any]) -> None:
        """Note that a shard is whole; `last`: and with it its lot."""
        entry = {"lot": lot, "shard": shard, "last": last, "threshold": self.threshold, "tally": vars(tally), **sides}
        self._remember(shard_name(lot, shard), entry)

    def num_shards(self, lot: Lot) -> int:
        """Shards of a lot that are there."""
        shard = 0
        while self.entry(lot, shard) is not None:
            shard += 1
        return shard

    def missing(self) -> list[Lot]:
        """Return the lots that are not whole."""
        return [lot for lot in self.lots if not self._is_whole(lot)]

    def _is_whole(self, lot: Lot) -> bool:
        count = self.num_shards(lot)
        last = self.entry(lot, count - 1) if count else None
        return last is not None and last["last"]

    def missing_parts(self) -> list[int]:
        """Return the parts, from 1, that are not done."""
        parts = self.num_parts or 1
        return sorted({lot.number % parts + 1 for lot in self.missing()})

    def in_order(self) -> Iterator[Mapping[str, Any] | None]:
        """Yield the entries in the order of training, see `lots.in_order`."""
        return in_order(self.lots, self.entry)

    def checked(self, part: Part) -> Tally | None:
        """Return what a part has found in its rows before tokenising, if it has looked."""
        saved = self._recall(f"checked-{part.number}-of-{part.of}", None)
        return None if saved is None else Tally.read(saved)

    def remember_checked(self, part: Part, tally: Tally) -> None:
        """Keep it for when the part is interrupted."""
        self._remember(f"checked-{part.number}-of-{part.of}", vars(tally))

    @contextmanager
    def failures(self, part: Part | None) -> Iterator[None]:
        """Leave word of what ends the block, for others that wait for it; forget what ended it the last time."""
        self.forget_failure(part)
        try:
            yield
        except UserError as error:
            if self.folder.exists():
                self._remember(_failure_of(part), str(error))
            raise

    def forget_failure(self, part: Part | None) -> None:
        """The part, or the whole in one, is tried again."""
        (self.folder / f"{_failure_of(part)}.json").unlink(missing_ok=True)

    def failure(self) -> str | None:
        """Say what ended the preparation or a part of it, if something has."""
        for path in sorted(self.folder.glob("failure*.json")):
            if text := self._recall(path.stem, None):
                return str(text)
        return None

    def forget(self) -> None:
        """Nothing counts of what was done: all of it is to be done again."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self._entries.clear()

    def delete(self) -> None:
        """The work is done."""
        shutil.rmtree(self.folder)

    def _remember(self, name: str, value: Any) -> None:
        with atomic_write(self.folder / f"{name}.json") as temporary:
            temporary.write_text(json_text(value), encoding="utf-8")

    def _recall(self, name: str, default: Any) -> Any:
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return default


def _failure_of(part: Part | None) -> str:
    return "failure" if part is None else f"failure-{part.number}-of-{part.of}"


def shard_name(lot: int, shard: int) -> str:
    """Return the name of a shard's files."""
    return f"{lot:05d}-{shard:03d}"
