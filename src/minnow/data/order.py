"""The order of training: which rows make up a step, as a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from minnow.data.shuffle import permutation

_EPOCH = 0xE90C  # keeps the row order apart from other shuffles with the same seed


def global_batch_rows(seed: int, step: int, rows_per_batch: int, num_rows: int) -> np.ndarray:
    """Return the rows of step `step` (from 0), int64 [rows_per_batch], all ranks and micro-batches together.

    Steps read on through endless epochs, each its own shuffle of all rows: every row once an epoch, and a batch may
    hold the end of one epoch and the start of the next. Pure: resuming needs only the step.
    """
    return windowed_batch_rows(seed, step, rows_per_batch, lambda: (num_rows,))


def windowed_batch_rows(
    seed: int, step: int, rows_per_batch: int, window_rows: Callable[[], Iterable[int]]
) -> np.ndarray:
    """`global_batch_rows` of rows that lie in windows: an epoch shuffles each, and goes through them in their order.

    window_rows: gives the number of rows of each window, and is asked only as far as the batch reaches.
    """
    places = step * rows_per_batch + np.arange(rows_per_batch)
    found: list[np.ndarray] = []
    epoch = 0
    begin = 0  # place of the window's first row
    while True:
        num_rows = 0  # of the epoch's windows so far
        for window, rows in enumerate(window_rows()):
            here = places[(places >= begin) & (places < begin + rows)] - begin
            if len(here):
                found.append(num_rows + _row_order(seed, epoch, window, rows)[here])
            begin += rows
            num_rows += rows
            if begin > places[-1]:
                return np.concatenate(found)
        epoch = max(epoch + 1, int(places[0]) // num_rows)
        begin = epoch * num_rows


@lru_cache(maxsize=4)
def _row_order(seed: int, epoch: int, window: int, num_rows: int) -> np.ndarray:
    # without the window's number for the first: see PackedRows._plan
    return permutation(num_rows, seed, _EPOCH, epoch, *([window] if window else []))
