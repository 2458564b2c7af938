"""Counter-based random numbers: a number is a pure function of (seed, sample, token), with no state to
share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minnow.data.shuffle import GOLDEN, splitmix64

_MASK = 2**64 - 1


def sample_key(seed: int, index: int) -> int:
    """The 64-bit stream key of sample `index` of a request: number `index` of the stream that `seed` begins."""
    first = int(splitmix64(np.array([seed & _MASK], dtype=np.uint64))[0])
    return int(splitmix64(np.array([(first + index * GOLDEN) & _MASK], dtype=np.uint64))[0])


def uniforms(keys: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) for each (key, step): float64 [B], 40 random bits each. keys: uint64.

    40 bits, so that the number times a float64 total never rounds up to the total.
    """
    counters = keys + np.array(steps, dtype=np.uint64) * np.uint64(GOLDEN)  # modulo 2**64
    return (splitmix64(counters) >> np.uint64(24)).astype(np.float64) * 2.0**-40
