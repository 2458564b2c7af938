"""Error bars: the Wilson interval for shares, mean and standard error, the bootstrap for everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959964
"""The normal distribution holds 95% between -z and z."""


@dataclass(frozen=True)
class Interval:
    """A figure with the 95% interval around it, in the figure's own unit."""

    value: float
    low: float
    high: float


def wilson_interval(successes: float, trials: int, z: float = Z_95) -> Interval:
    """A share and its interval by Wilson (1927): honest for few trials and for shares near 0 and 1.

    With p = successes / trials and n = trials:

        (p + z^2 / 2n  -/+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    ValueError without trials.
    """
    if trials < 1:
        raise ValueError("the share of no trials is undefined")
    share = successes / trials
    centre = share + z**2 / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return Interval(share, max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale))


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error sqrt(sum (x - mean)^2 / (n - 1) / n); the error of one value is infinite."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, samples: int = 1000, seed: int = 0
) -> Interval:
    """sum(numerators) / sum(denominators) over rows, with the percentile bootstrap over rows (Efron, 1979).

    Rows are drawn again with replacement `samples` times; 2.5% of the redrawn ratios lie below `low` and 2.5% above
    `high`. With denominators of 1 it is the mean. The same seed gives the same interval.
    """
    numerators_N, denominators_N = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    rng = np.random.default_rng(seed)
    ratios = np.empty(samples)
    for sample in range(samples):
        rows = rng.integers(len(numerators_N), size=len(numerators_N))
        ratios[sample] = numerators_N[rows].sum() / denominators_N[rows].sum()
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(float(numerators_N.sum() / denominators_N.sum()), float(low), float(high))
