"""Prepared data in numbers: what `minnow data prepare` and `minnow data inspect` print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from minnow.data.batches import PackedDataset
from minnow.data.prepare import PreparedData
from minnow.data.shards import Shards


def summarise(data: PreparedData, sequence_length: int) -> dict[str, Any]:
    """Return counts of rows, documents, tokens and packed rows as plain JSON values."""
    report = data.report
    train, validation = data.packed(sequence_length)
    return {
        "folder": str(data.folder),
        "rows": report.rows,
        "skipped_rows": report.skipped_rows,
        "documents": report.documents,
        "cut_conversations": report.cut_conversations,
        "cut_pieces": report.cut_pieces,
        "long_turns": report.long_turns,
        "long_systems": report.long_systems,
        "long_pairs": report.long_pairs,
        "long_shown": report.long_shown,
        "picture_tokens": image_format.num_tokens if (image_format := data.train.image_format) else None,
        "train": _split(train),
        "validation": _split(validation),
    }


def _split(packed: PackedDataset) -> dict[str, Any]:
    shards = packed.shards
    text_bytes, counts = 0, Counter[int]()  # a shard at a time: all lengths may be too many for the memory
    for number in range(shards.num_shards):
        part = shards.subset([number])
        text_bytes += int(part.text_bytes.sum())
        lengths, times = np.unique(part.lengths, return_counts=True)
        counts.update(dict(zip(lengths.tolist(), times.tolist(), strict=True)))
    return {
        "documents": shards.num_documents,
        "tokens": shards.num_tokens,
        "text_bytes": text_bytes,
        "pictures": shards.num_pictures,
        "longest": max(counts, default=0),
        "median": median_of(counts),
        "packed_rows": packed.num_rows,
        "fill": packed.fill,
    }


def median_of(counts: Mapping[int, int]) -> float:
    """Return the median of values that occur `counts[value]` times each; 0 of none."""
    values = np.array(sorted(counts), np.int64)
    ends = np.cumsum([counts[value] for value in values.tolist()])
    if not len(values):
        return 0.0
    middle = (ends[-1] - 1) // 2, ends[-1] // 2
    return float(values[np.searchsorted(ends, middle, side="right")].mean())


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Count documents by length in powers of two: (from, up to and with, documents), no empty end."""
    if not len(lengths):
        return []
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(exponents)
    return [(2 ** (e - 1) + 1 if e else 1, 2**e, int(counts[e])) for e in range(int(exponents.min()), len(counts))]


def loss_runs(shards: Shards, document: int, limit: int) -> list[tuple[np.ndarray, float]]:
    """Cut the first `limit` tokens of a document into (ids, loss weight) runs of one weight.

    The first token has nothing to be predicted from, so its weight is 0.
    """
    tokens = shards.tokens(document, 0, limit)
    weights = shards.weights(document, 0, limit).copy()
    weights[:1] = 0
    borders = np.flatnonzero(np.diff(weights)) + 1
    firsts = [0, *borders.tolist()]
    return [(run, float(weights[first])) for run, first in zip(np.split(tokens, borders), firsts, strict=True)]
