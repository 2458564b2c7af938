"""The curves of the task `long-context`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from minnow.report.plots import BLUE, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Bars = Mapping[str, Mapping[str, float]]
"""Figures by name, READING/POSITIONS, each with value, low and high."""

GREY, GREEN = "#777777", "#3c8d40"
COLOURS = {"in pieces": GREY, "as it is": ORANGE, "yarn": BLUE, "after training": GREEN}


def long_context_figure(bits: Bars, facts: Bars, trained: int, title: str) -> Figure:
    """Bits per byte by position and, where there are hidden facts, the share of them found by length.

    Without the figures' intervals: these tell how texts differ, and all curves are of the same texts.
    trained: the trained length in tokens, drawn as a line across.
    """
    figure = new_figure(11 if facts else 6, 4.2)
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(1, 2 if facts else 1, squeeze=False)[0]
    _curves(panels[0], bits, trained)
    panels[0].set(title="bits per byte by position", xlabel="position, tokens", ylabel="bits per byte")
    if facts:
        _curves(panels[1], facts, trained)
        panels[1].set(
            title="hidden facts found", xlabel="length of the text, tokens", ylabel="share", ylim=(-0.03, 1.03)
        )
        panels[1].set_xscale("log", base=2)
    return figure


def _curves(axes: Axes, bars: Bars, trained: int) -> None:
    by_reading: dict[str, list[tuple[float, Mapping[str, float]]]] = {}
    for name, bar in bars.items():
        reading, _, place = name.partition("/")
        if place != "all":
            ends = [int(end) for end in place.split("-")]
            by_reading.setdefault(reading, []).append((sum(ends) / len(ends), bar))
    for reading, points in by_reading.items():
        places = [place for place, _ in points]
        axes.plot(places, [bar["value"] for _, bar in points], color=COLOURS[reading], marker=".", label=reading)
    axes.axvline(trained, color="black", lw=0.8, ls="--", label="trained length")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
