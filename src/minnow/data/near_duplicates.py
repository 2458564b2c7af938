"""Near duplicates among rows that come one by one: MinHash signatures in a table of bands (rensa does both)."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np

from minnow.config import UserError
from minnow.data.ngrams import shingles, words

HASHES = 128
"""Of a signature. The estimate of a similarity s has a standard error of sqrt(s (1 - s) / HASHES): 0.035 at 0.8."""
_SURE = 0.9  # how likely a pair at the threshold must meet in a band; a more alike one surely does


class Match(NamedTuple):
    """An earlier row that says nearly the same."""

    row: int
    similarity: float


class NearDuplicates:
    """Rows seen so far, none of them nearly like an earlier one.

    The similarity s of two texts is that of their sets of shingles (see `minnow.data.ngrams`), Jaccard's
    |A and B| / |A or B|. The least hash of a set is the same for two sets with just that probability (Broder 1997), so
    HASHES of them, a signature, estimate it. Signatures are cut into b bands of r hashes; two rows are compared if they
    share a band, which has the probability 1 - (1 - s^r)^b (Leskovec, Rajaraman and Ullman, "Mining of Massive
    Datasets", chapter 3).

    A row with answers (see `Said`) is like another only if its answers are, too: many questions about one long passage
    are not copies of each other.

    Memory for each row: a signature of 512 bytes, as much again where it has answers, and about 105 bytes a band.
    """

    def __init__(self, threshold: float, seed: int) -> None:
        """Rows at least `threshold` alike (0 to 1) are duplicates; `seed` picks the hash functions."""
        try:
            import rensa
        except ImportError as error:
            raise UserError("near duplicates need rensa: pip install 'minnow[clean]'") from error
        self.threshold, self.seed = threshold, seed
        self.bands = HASHES // band_size(threshold)
        self._sketch = rensa.RMinHash
        self._table = rensa.RMinHashLSH(threshold, HASHES, self.bands)
        self._rows = array("Q")
        self._signatures: list[tuple[bytes, bytes]] = []

    def match_or_add(self, row: int, talk: str, answers: str) -> Match | None:
        """Return the earlier row most alike, the first of equals; None if there is none, and remember this one."""
        parts = shingles(words(talk))
        if not parts:
            return None  # no word: nothing to be like
        sketch = self._sketch(HASHES, self.seed)
        sketch.update(parts)
        signature = (_bytes(sketch), self._signature(answers))
        found = self._best(sorted(self._table.query(sketch)), signature)
        if found is None:
            self._table.insert(len(self._rows), sketch)
            self._rows.append(row)
            self._signatures.append(signature)
        return found

    def _signature(self, text: str) -> bytes:
        parts = shingles(words(text))
        if not parts:
            return b""
        sketch = self._sketch(HASHES, self.seed)
        sketch.update(parts)
        return _bytes(sketch)

    def _best(self, candidates: list[int], signature: tuple[bytes, bytes]) -> Match | None:
        best: Match | None = None
        for candidate in candidates:
            talk, answers = self._signatures[candidate]
            similarity = _similarity(signature[0], talk)
            if similarity >= self.threshold:
                similarity = min(similarity, _similarity(signature[1], answers))
            if similarity >= self.threshold and (best is None or similarity > best.similarity):
                best = Match(self._rows[candidate], similarity)
        return best


def band_size(threshold: float) -> int:
    """Hashes in a band: as many as leave a pair at the threshold a chance of at least 0.9 to share a band."""
    sizes = [2**power for power in range(HASHES.bit_length())]
    return max(size for size in sizes if size == 1 or 1 - (1 - threshold**size) ** (HASHES // size) >= _SURE)


def _bytes(sketch: object) -> bytes:
    return array("I", sketch.digest()).tobytes()  # type: ignore[attr-defined]


def _similarity(left: bytes, right: bytes) -> float:
    if left == right:
        return 1.0
    if not left or not right:
        return 0.0
    return float(np.mean(np.frombuffer(left, np.uint32) == np.frombuffer(right, np.uint32)))
