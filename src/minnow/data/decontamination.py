"""Rows that hold a piece of an evaluation set, found by n-grams they share with it.

Brown et al. 2020 (GPT-3, arXiv 2005.14165, appendix C): a document is contaminated if it shares 13 words in a row with
an example, in lower case and without punctuation; an example shorter than that must stand there whole, and one below 8
words is not looked for. N-grams that too many examples share are a phrase or a form, not an example: not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minnow.config import UserError
from minnow.data.ngrams import is_spaceless, words
from minnow.data.readers import read_rows
from minnow.data.shuffle import splitmix64

SHORTEST, LENGTH = 8, 13
"""Words of the shortest example, and of an n-gram."""
SHORTEST_SPACELESS, LENGTH_SPACELESS = 12, 20
"""The same in characters, for examples that are mostly in a script without spaces: a Chinese word has about 1.5."""
COMMON = 10
"""An n-gram in more examples than this is not counted."""
_BASE = 0x9E3779B97F4A7C15 | 1


class Overlap(NamedTuple):
    """What a row shares with an evaluation example."""

    example: str
    """FILE:LINE of the example."""
    share: float
    """Part of the example's n-grams that stand in the row."""
    words: str
    """The first n-gram they share."""


class EvaluationSets:
    """The n-grams of all examples; every text of a row with enough words (question, passage, option) is an example.

    Memory: 16 bytes an n-gram, and the words of the examples.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        """Read `paths`, data of any form. Raises UserError for a bad row, or if there is nothing to look for."""
        self.examples = 0
        """Looked for."""
        self.short = 0
        """Too short to be looked for."""
        self._ids: dict[str, int] = {}  # number of each word that occurs in an example, from 1
        self._places: list[str] = []
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        seen: set[tuple[str, ...]] = set()
        for place, row in read_rows(paths):
            for example in map(tuple, map(words, _texts(row))):
                shortest, length = _lengths(example)
                if len(example) < shortest:
                    self.short += 1
                elif example not in seen:
                    seen.add(example)
                    ids = np.array([self._ids.setdefault(word, len(self._ids) + 1) for word in example], np.uint64)
                    length = min(length, len(example))
                    found.setdefault(length, []).append((np.unique(_hashes(ids, length)), self.examples))
                    self._places.append(place)
                    self.examples += 1
        if not self.examples:
            least = f"{SHORTEST} words ({SHORTEST_SPACELESS} Chinese characters)"
            raise UserError(f"{', '.join(paths)}: no text here has {least}, so there is nothing to look for")
        self._tables = {length: _table(parts) for length, parts in found.items()}
        owners = np.concatenate([owners for _, owners in self._tables.values()])
        self._totals = np.bincount(owners, minlength=self.examples)

    def find(self, text: str) -> Overlap | None:
        """Return what `text` shares with an example, with the one most of which it holds; None if it shares nothing."""
        sequence = words(text)
        ids = np.fromiter((self._ids.get(word, 0) for word in sequence), np.uint64, len(sequence))
        shared: Counter[int] = Counter()
        where: dict[int, tuple[int, int]] = {}
        for length, (hashes, owners) in self._tables.items():
            mine = _hashes(ids, length)
            at = np.minimum(np.searchsorted(hashes, mine), len(hashes) - 1) if len(hashes) else np.empty(0, np.int64)
            hits = np.flatnonzero(hashes[at] == mine) if len(at) else at
            _, first = np.unique(mine[hits], return_index=True)
            for hit in hits[np.sort(first)].tolist():
                example = int(owners[at[hit]])
                shared[example] += 1
                where.setdefault(example, (hit, length))
        if not shared:
            return None
        example = max(shared, key=lambda number: (shared[number] / self._totals[number], -number))
        start, length = where[example]
        joined = "" if all(map(is_spaceless, sequence[start : start + length])) else " "
        share = float(shared[example] / self._totals[example])
        return Overlap(self._places[example], share, joined.join(sequence[start : start + length]))


def _lengths(example: Sequence[str]) -> tuple[int, int]:
    spaceless = 2 * sum(map(is_spaceless, example)) > len(example)
    return (SHORTEST_SPACELESS, LENGTH_SPACELESS) if spaceless else (SHORTEST, LENGTH)


def _table(parts: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted hashes of the n-grams of one length that are not too common, and the first example each is met in."""
    hashes = np.concatenate([part for part, _ in parts])
    owners = np.concatenate([np.full(len(part), example, np.int64) for part, example in parts])
    unique, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    return unique[counts <= COMMON], owners[first[counts <= COMMON]]


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _hashes(ids_N: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of each run of `length` word numbers; uint64 [N - length + 1], empty where N is smaller."""
    count = len(ids_N) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    with np.errstate(over="ignore"):
        scrambled = splitmix64(ids_N)
        total = np.zeros(count, np.uint64)
        for offset in range(length):
            total = total * np.uint64(_BASE) + scrambled[offset : offset + count]
    return total
