"""Shuffling that any machine and any numpy repeats: a permutation is the argsort of hashed counters."""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio: what a splitmix64 stream's counter grows by from one number to the next."""
_MASK = (1 << 64) - 1


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 counters into uint64 hashes (Steele, Lea and Flood 2014, "Fast splittable PRNGs")."""
    z = values + np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_of(*key: int) -> int:
    """Return 64 bits that stand for the integers in `key`, in their order."""
    state = 0
    for part in key:
        mixed = splitmix64(np.array([(state + part) & _MASK], dtype=np.uint64))
        state = int(mixed[0])
    return state


def permutation(length: int, *key: int) -> np.ndarray:
    """Shuffle 0..length-1; int64 [length], a pure function of `length` and the integers in `key`.

    numpy promises stable streams only for its legacy generator, and resume must not hang on numpy's version.
    """
    state = hash_of(*key)
    with np.errstate(over="ignore"):
        hashes = splitmix64(np.arange(length, dtype=np.uint64) + np.uint64(state))
    return np.argsort(hashes, kind="stable")
