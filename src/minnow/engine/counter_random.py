"""Counter-based random numbers: a number is a pure function of (seed, sample, token), with no state to
share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample_key(seed: int, index: int) -> int:
    """The 64-bit stream key of sample `index` of a request."""
    first = int(_mix(np.array([(seed + _GOLDEN) & _MASK], dtype=np.uint64))[0])
    return int(_mix(np.array([(first + (index + 1) * _GOLDEN) & _MASK], dtype=np.uint64))[0])


def uniforms(keys: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) for each (key, step): float64 [B], 40 random bits each. keys: uint64.

    40 bits, so that the number times a float64 total never rounds up to the total.
    """
    counters = keys + (np.array(steps, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)  # modulo 2**64
    return (_mix(counters) >> np.uint64(24)).astype(np.float64) * 2.0**-40
