"""Shards of made-up tokens."""

from pathlib import Path

import numpy as np

from minnow.data.shard_writer import ShardWriter, finish_folder, folder_meta
from minnow.data.shards import Shards

VOCAB = 1000


def write_shards(folder: Path, documents, weights=None, *, vocab_size=VOCAB, per_shard=5) -> Shards:
    entries = []
    for number, first in enumerate(range(0, len(documents), per_shard)):
        part = documents[first : first + per_shard]
        writer = ShardWriter(folder, f"{number:05d}", vocab_size, weights is not None)
        lengths = np.array([len(d) for d in part], dtype=np.int64)
        part_weights = None if weights is None else np.concatenate(weights[first : first + per_shard])
        writer.append(np.concatenate(part), lengths, lengths - 2, part_weights)
        entries.append(writer.finish())
    finish_folder(folder, folder_meta(entries, vocab_size, weights is not None))
    shards = Shards.open(folder)
    shards.verify()
    return shards


def documents_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, n) for n in lengths]
