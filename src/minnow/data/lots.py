"""Lots: the pieces of the input that are prepared each on its own, by whichever process or machine.

A lot is small files together, a stretch of a large one, or a large one that cannot be read from its middle, and gives
one shard, or several of about SHARD_BYTES. Which lots there are and in which order their shards are learnt from follows
from sizes alone: nobody needs to have read one lot to know where the next begins.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from minnow.data.encoding import RawBatch
from minnow.data.files import is_packed
from minnow.data.parquet import row_groups
from minnow.data.readers import Raw, is_divisible, iter_raw
from minnow.data.shuffle import permutation
from minnow.data.sources import Source

LOT_BYTES = 1 << 25
"""Unpacked bytes of a lot, roughly."""
SHARD_BYTES = 1 << 26
"""Raw rows of a shard at most: what an interruption costs, a few seconds of work."""
BATCH_BYTES = 1 << 20
"""Raw rows that a worker gets at a time."""

ROW_OF_PICTURES = 1 << 15
"""Bytes that a row of data with pictures counts for beside its own: its pictures may lie in files, which only those who
encode it read, and hold in memory."""

_UNPACKED = 3  # bytes of text that a stored byte of .gz, .zst or parquet stands for, roughly


@dataclass(frozen=True)
class Span:
    """A stretch of a source, see `iter_raw`."""

    source: int
    """Which of the sources."""
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Lot:
    """What is prepared in one go. Its shards are numbered from 0."""

    number: int
    entry: int
    """Which of the given paths it belongs to."""
    spans: tuple[Span, ...]
    begins: float
    """Where in its path it begins, 0 to 1, by size; before everything (-inf) for what only validates."""
    step: float
    """How far a further shard of it lies behind the one before."""

    def place(self, shard: int) -> float:
        """Where in its path a shard of it begins, 0 to 1."""
        return self.begins + shard * self.step


def cut_into_lots(sources: Sequence[Source], held_out: Collection[int] = ()) -> list[Lot]:
    """Cut the sources into lots, numbered in the order of their places in their paths.

    held_out: entries that only validate; they come first, so that there is something to validate on from the start.
    """
    entries: dict[int, list[int]] = {}
    for number, source in enumerate(sources):
        entries.setdefault(source.entry, []).append(number)
    cut = {entry: list(_grouped(sources, numbers)) for entry, numbers in entries.items()}
    sizes = {entry: sum(size for _, size in lots) for entry, lots in cut.items()}
    drafts = []
    for entry, lots in cut.items():
        total = sizes[entry] or max(sizes.values()) or 1  # of a data set of the Hub nobody tells the size
        before = 0
        for spans, size in lots:
            begins = -math.inf if entry in held_out else before / total
            drafts.append((begins, entry, spans, SHARD_BYTES / total))
            before += size
    drafts.sort(key=lambda draft: draft[:2])
    return [Lot(number, entry, spans, begins, step) for number, (begins, entry, spans, step) in enumerate(drafts)]


def in_order(
    lots: Sequence[Lot], read: Callable[[Lot, int], Mapping[str, Any] | None]
) -> Iterator[Mapping[str, Any] | None]:
    """Yield `read(lot, shard)` of every shard in the order of training, and None for as long as the next is missing.

    Paths take turns, each as fast as it is long: every stretch of the order has the mixture of the whole. An entry's
    "last" says that its lot has no further shard; so the order of what is there never depends on what is yet to come.
    """
    queues: dict[int, deque[Lot]] = {}
    for lot in lots:
        queues.setdefault(lot.entry, deque()).append(lot)
    shards = dict.fromkeys(queues, 0)
    while queues:
        entry = min(queues, key=lambda entry: (queues[entry][0].place(shards[entry]), entry))
        while (found := read(queues[entry][0], shards[entry])) is None:
            yield None
        yield found
        shards[entry] += 1
        if found["last"]:
            queues[entry].popleft()
            shards[entry] = 0
            if not queues[entry]:
                del queues[entry]


def interleaved(lots: Sequence[Lot], batches: Callable[[Lot], Iterator[RawBatch]]) -> Iterator[RawBatch]:
    """Yield the `batches` of all lots, whole shards, about in the order of `in_order`: the path that lags goes on."""
    by_entry: dict[int, list[Lot]] = {}
    for lot in lots:
        by_entry.setdefault(lot.entry, []).append(lot)
    rest = {entry: chain.from_iterable(map(batches, queue)) for entry, queue in by_entry.items()}
    reached = {entry: queue[0].begins for entry, queue in by_entry.items()}
    while rest:
        entry = min(rest, key=lambda entry: (reached[entry], entry))
        for batch in rest[entry]:
            yield batch
            if batch.closes:
                reached[entry] = batch.place
                break
        else:
            del rest[entry]


def raw_batches(
    lot: Lot, sources: Sequence[Source], first_shard: int = 0, *, only_local: bool = False, with_pictures: bool = False
) -> Iterator[RawBatch]:
    """Cut a lot's rows into batches of about BATCH_BYTES, and these into shards; the same every time.

    There is at least one batch, be it empty. only_local: leave out what would have to be downloaded. with_pictures:
    rows may show some.
    """
    chunks = _chunks(lot, sources, only_local, ROW_OF_PICTURES if with_pictures else 0)
    folders = tuple(sources[span.source].folder for span in lot.spans)
    shard, in_shard = 0, 0
    following: tuple[list[tuple[int, int, Raw]], int] | None = next(chunks, ([], 0))
    while following is not None:
        rows, size = following
        following = next(chunks, None)
        in_shard += size
        last = following is None
        closes = last or in_shard >= SHARD_BYTES
        if shard >= first_shard:
            yield RawBatch(lot.entry, lot.number, shard, lot.place(shard), rows, folders, closes, last)
        if closes:
            shard, in_shard = shard + 1, 0


def _grouped(sources: Sequence[Source], numbers: Sequence[int]) -> Iterator[tuple[tuple[Span, ...], int]]:
    """Give one path's stretches, small ones together, with their unpacked bytes.

    Its files come in a shuffled order: they are often sorted by what is in them.
    """
    spans: list[Span] = []
    size = 0
    for place in permutation(len(numbers), 0).tolist():
        for span, more in _stretches(numbers[place], sources[numbers[place]]):
            spans.append(span)
            size += more
            if size >= LOT_BYTES:
                yield tuple(spans), size
                spans, size = [], 0
    if spans:
        yield tuple(spans), size


def _stretches(number: int, source: Source) -> Iterator[tuple[Span, int]]:
    packed = source.format == "parquet" or is_packed(source.name)
    size = source.size * _UNPACKED if packed else source.size
    if size <= LOT_BYTES or not is_divisible(source):
        yield Span(number), size
    elif source.format == "jsonl":
        for start in range(0, size, LOT_BYTES):
            yield Span(number, start, start + LOT_BYTES), min(LOT_BYTES, size - start)
    else:
        first, size = 0, 0
        groups = row_groups(source.name)
        for group, (_, unpacked) in enumerate(groups, 1):
            size += unpacked
            if size >= LOT_BYTES or group == len(groups):
                yield Span(number, first, group), size
                first, size = group, 0


def _chunks(
    lot: Lot, sources: Sequence[Source], only_local: bool, bytes_beside: int
) -> Iterator[tuple[list[tuple[int, int, Raw]], int]]:
    rows: list[tuple[int, int, Raw]] = []
    size = 0
    for number, span in enumerate(lot.spans):
        source = sources[span.source]
        if only_local and not source.is_local:
            continue
        for row_number, raw in iter_raw(source, start=span.start, stop=span.stop):
            rows.append((number, row_number, raw))
            size += _size(raw) + bytes_beside
            if size >= BATCH_BYTES:
                yield rows, size
                rows, size = [], 0
    if rows:
        yield rows, size


def _size(raw: Raw | object) -> int:
    if isinstance(raw, bytes | str):
        return len(raw)
    if isinstance(raw, Mapping):
        return 64 + sum(map(_size, raw.values()))
    return 64 + sum(map(_size, raw)) if isinstance(raw, list) else 8
