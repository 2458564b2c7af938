"""Is a model as often right as it says? Confidence beside accuracy, as figures and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minnow.report.plots import BLUE, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence."""

    confidence: float
    """Mean probability that the model gives the answer it prefers."""
    accuracy: float
    """How often that answer is the better one."""
    count: int


def reliability(margins: Sequence[float], num_bins: int = 10) -> list[Bin]:
    """Sort pairs by confidence sigmoid(|margin|), 0.5 to 1, into bins of equal width; empty ones are left out.

    margins: reward of the better answer minus that of the worse one; the model is right where it is positive.
    """
    bins: list[list[tuple[float, float]]] = [[] for _ in range(num_bins)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        right = 0.5 + 0.5 * ((margin > 0) - (margin < 0))
        bins[min(num_bins - 1, int((confidence - 0.5) * 2 * num_bins))].append((confidence, right))
    return [
        Bin(sum(c for c, _ in group) / len(group), sum(r for _, r in group) / len(group), len(group))
        for group in bins
        if group
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of accuracy from confidence, bins weighted by their pairs (Naeini et al., 2015)."""
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / sum(b.count for b in bins)


def reliability_figure(bins: Sequence[Bin], title: str) -> Figure:
    """Accuracy over confidence with the diagonal of perfect calibration, and how many pairs stand behind each point."""
    figure = new_figure(6, 6.5)
    figure.suptitle(f"{title}: expected calibration error {expected_calibration_error(bins):.1%}")
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    confidences = [b.confidence for b in bins]
    curve.plot([0.5, 1], [0.5, 1], color="grey", lw=1, ls="--", label="as often right as it says")
    # As large as the bin is full, and not joined: a bin of one pair is right or wrong and says next to nothing.
    total = sum(b.count for b in bins)
    areas = [max(6.0, 300.0 * b.count / total) for b in bins]
    curve.scatter(confidences, [b.accuracy for b in bins], s=areas, color=BLUE, label="the reward model", zorder=3)
    curve.set(ylabel="share of pairs judged right", xlim=(0.48, 1.02))
    (_, handle) = curve.legend(frameon=False, loc="lower right").legend_handles
    handle.set_sizes([40.0])
    counts.bar(confidences, [b.count for b in bins], width=0.03, color=ORANGE)
    counts.set(ylabel="pairs", xlabel="probability that the model gives its preferred answer")
    for axes in (curve, counts):
        axes.grid(alpha=0.25)
    return figure
