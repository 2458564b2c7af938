"""Packing documents of any length into rows of one length: best fit, with splitting where it is allowed.

An example of N tokens is N - 1 *positions*: inputs tokens[:-1], targets tokens[1:]. A piece (document, start, length)
covers inputs start..start+length and the targets one further, so the pieces of a cut document hold every target of
it exactly once, and no position is spent twice.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from minnow.data.shuffle import permutation

_PACKING = 0x9AC4  # keeps the packing order apart from other shuffles with the same seed
_POSITION = (1 << 40) - 1
WINDOW = 2048
"""Documents to choose from at a time. More fills rows of unsplit documents a little better and mixes less freely."""


@dataclass(frozen=True)
class PackPlan:
    """Which pieces lie in which row, in order."""

    sequence_length: int
    """Positions of a row."""
    documents: np.ndarray
    """int64 [pieces]: the document of each piece."""
    starts: np.ndarray
    """int64 [pieces]: first position of the piece in its document."""
    lengths: np.ndarray
    """int64 [pieces]: positions of the piece."""
    row_starts: np.ndarray
    """int64 [rows + 1]: pieces row_starts[r] .. row_starts[r + 1] are row r."""

    @property
    def num_rows(self) -> int:
        """Rows of the plan: one epoch."""
        return len(self.row_starts) - 1

    @property
    def num_positions(self) -> int:
        """Real positions, filler not counted."""
        return int(self.lengths.sum())

    @property
    def fill(self) -> float:
        """Real positions as a share of all, 0 to 1."""
        return self.num_positions / max(1, self.num_rows * self.sequence_length)


def pack(lengths: np.ndarray, sequence_length: int, *, split: bool, seed: int) -> PackPlan:
    """Plan one epoch over documents of `lengths` tokens (int64 [documents]) in rows of `sequence_length` positions.

    A document longer than a row first gives whole rows. What is left of it, and the shorter ones, come in an order
    shuffled by `seed` through a window of 2,048. A row starts with the piece that has waited longest (so that rows
    keep the mixture of lengths and nothing waits for ever), then takes the longest in the window that fits, again
    and again: best fit. With `split`, a hole that nothing fits is filled with the head of the longest piece in the
    window, whose rest starts the next row: at most one cut a row, and only the last row has more filler than 0.25%,
    a hole too small to be worth a cut. (Ding et al. 2024, "Fewer truncations improve language modeling",
    arXiv:2404.10830, cut only what is longer than a row; filling the holes as well wastes nothing.)

    Without `split`, every document must fit a row. Documents of fewer than two tokens have no position and are left
    out. Deterministic; a few seconds for a million documents.
    """
    positions = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
    whole, rest = np.divmod(positions, sequence_length)
    if not split:
        assert not np.any(positions > sequence_length), "a document longer than a row needs split"
    documents = np.repeat(np.arange(len(positions)), whole)
    nth = np.arange(len(documents)) - np.repeat(np.cumsum(whole) - whole, whole)
    full_rows = np.stack([documents, nth * sequence_length, np.full(len(documents), sequence_length)], axis=1)

    order = permutation(len(positions), seed, _PACKING)
    order = order[rest[order] > 0]
    starts = (positions - rest)[order]
    pieces, row_ends = _best_fit(order.tolist(), starts.tolist(), rest[order].tolist(), sequence_length, split)
    table = np.concatenate([full_rows, np.frombuffer(pieces, dtype=np.int64).reshape(-1, 3)])
    row_starts = np.concatenate([np.arange(len(full_rows) + 1), len(full_rows) + np.array(row_ends, dtype=np.int64)])
    document, start, length = (np.ascontiguousarray(table[:, column]) for column in range(3))
    return PackPlan(sequence_length, document, start, length, row_starts)


def pack_groups(lengths: np.ndarray, group: int, sequence_length: int, *, seed: int) -> PackPlan:
    """Plan one epoch in which each `group` documents that follow one another (a pair's two answers) share a row.

    Nothing is split. A group whose positions together exceed a row must not be there.
    """
    positions = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
    plan = pack(positions.reshape(-1, group).sum(1) + 1, sequence_length, split=False, seed=seed)
    documents = (plan.documents[:, None] * group + np.arange(group)).ravel()
    return PackPlan(sequence_length, documents, np.zeros_like(documents), positions[documents], plan.row_starts * group)


def _best_fit(
    documents: list[int], starts: list[int], lengths: list[int], size: int, split: bool
) -> tuple[array, array]:
    """Pack pieces shorter than a row, in the given order; flat (document, start, length) triples and row ends.

    `starts` and `lengths` say what is still unplaced of each piece and are used up. Plain Python over a sorted list:
    the next choice depends on the last, and a bisection with a short memmove beats any tree here.
    """
    pieces, row_ends = array("q"), array("q")
    slack = size // 400 if split else 0
    window: list[int] = []  # sorted keys length << 40 | position in the order
    arrived, oldest, cut = 0, 0, -1
    while True:
        if cut < 0:  # nothing was cut in the row before: the longest waiting starts this one
            while oldest < arrived and not lengths[oldest]:
                oldest += 1
            if oldest == len(lengths):
                return pieces, row_ends
            first = oldest
            if first == arrived:
                arrived += 1
            else:
                del window[bisect_left(window, lengths[first] << 40 | first)]
        else:
            first = cut
        cut = -1
        pieces.extend((documents[first], starts[first], lengths[first]))
        hole = size - lengths[first]
        lengths[first] = 0
        while hole > slack:
            while len(window) < WINDOW and arrived < len(lengths):
                insort(window, lengths[arrived] << 40 | arrived)
                arrived += 1
            fit = bisect_left(window, (hole + 1) << 40)  # pieces before this one fit the hole
            if not window or (fit == 0 and not split):
                break
            chosen = window.pop(fit - 1) & _POSITION  # when nothing fits, -1: the longest
            taken = min(hole, lengths[chosen])
            pieces.extend((documents[chosen], starts[chosen], taken))
            starts[chosen] += taken
            lengths[chosen] -= taken
            hole -= taken
            if lengths[chosen]:
                cut = chosen
        row_ends.append(len(pieces) // 3)
