"""The figures of docs/generation.md: `python benchmarks/generation_figures.py` writes them there."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

HERE = Path(__file__).parents[1] / "docs"
BLUE, ORANGE, GREEN, GREY, PALE = "#4c78a8", "#f58518", "#54a24b", "#9d9d9d", "#eeeeee"
plt.rcParams.update({"svg.hashsalt": "minnow", "font.size": 10})


def box(ax: Axes, x: float, y: float, text: str, color: str, width: float = 1.0) -> None:
    ax.add_patch(Rectangle((x, y), width, 1, facecolor=color, edgecolor="white", linewidth=1.5))
    ink = "black" if color == PALE else "white"
    ax.text(x + width / 2, y + 0.5, text, ha="center", va="center", color=ink, fontsize=9)


def save(fig: plt.Figure, ax: Axes, name: str, width: float, height: float) -> None:
    ax.set_xlim(-0.1, width)
    ax.set_ylim(-0.1, height)
    ax.set_aspect("equal")
    ax.axis("off")
    fig.savefig(HERE / name, bbox_inches="tight", metadata={"Date": None})
    plt.close(fig)


def kv_cache() -> None:
    """Which keys and values a step computes, with and without a cache."""
    fig, ax = plt.subplots(figsize=(8, 3.2))
    words = ["the", "carp", "lives", "in", "the", "pond"]
    for column, title in ((0, "without: all tokens, each step"), (9, "with: one token a step")):
        ax.text(column, 6.4, title, fontsize=10, weight="bold")
        for step in range(4):
            y = 5 - step * 1.25
            for i in range(3 + step):
                known = column > 0 and step > 0 and i < 2 + step
                box(ax, column + i * 1.25, y, words[i], GREY if known else BLUE, 1.2)
    box(ax, 0, -0.05, "computed", BLUE, 2.2)
    box(ax, 2.5, -0.05, "read from the cache", GREY, 4.6)
    save(fig, ax, "generation_kv_cache.svg", 17, 7.2)


def paging() -> None:
    """Two samples of one prompt: block tables, shared blocks, and the copy before a write."""
    fig, ax = plt.subplots(figsize=(8, 3.6))
    for y, name, table in ((5.2, "sample 1", [4, 0, 7]), (0.2, "sample 2", [4, 0, 2])):
        ax.text(-0.1, y + 1.2 if y > 3 else y - 0.5, f"{name}: block table", fontsize=10, weight="bold")
        for i, block in enumerate(table):
            box(ax, i * 1.1, y, str(block), BLUE if i < 2 else (ORANGE if block == 7 else GREEN), 1.05)
    ax.text(7, 6.4, "blocks of 4 tokens in memory", fontsize=10, weight="bold")
    contents = {
        0: (BLUE, "lives in the pond"),
        2: (GREEN, ". It eats"),
        4: (BLUE, "the old red carp"),
        7: (ORANGE, ". She is"),
    }
    for block in range(8):
        color, text = contents.get(block, (PALE, "free"))
        box(ax, 7, 5.2 - block * 0.75, "", color, 5.2)
        ax.add_patch(Rectangle((7, 5.2 - block * 0.75 - 0.02), 5.2, 0.27, facecolor="white", edgecolor="none"))
        ax.text(9.6, 5.2 - block * 0.75 + 0.62, f"{block}:  {text}", ha="center", va="center", fontsize=9,
                color="black" if color == PALE else "white")  # fmt: skip
    for y0 in (5.7, 0.7):
        for block, x in ((4, 0.5), (0, 1.6)):
            ax.annotate("", xy=(6.95, 5.2 - block * 0.75 + 0.62), xytext=(x + 0.5, y0 + (0.55 if y0 < 3 else -0.5)),
                        arrowprops={"arrowstyle": "->", "color": GREY, "lw": 0.8})  # fmt: skip
    ax.annotate(
        "", xy=(6.95, 5.2 - 7 * 0.75 + 0.62), xytext=(3.2, 5.2), arrowprops={"arrowstyle": "->", "color": ORANGE}
    )
    ax.annotate(
        "", xy=(6.95, 5.2 - 2 * 0.75 + 0.62), xytext=(3.2, 1.2), arrowprops={"arrowstyle": "->", "color": GREEN}
    )
    save(fig, ax, "generation_paging.svg", 12.6, 7.2)


def batching() -> None:
    """Steps of continuous batching: a prompt is read in pieces beside rows that decode."""
    fig, ax = plt.subplots(figsize=(8, 2.8))
    rows = {
        "A": [("prompt 3", BLUE), *[("1", ORANGE)] * 5],
        "B": [("prompt 2", BLUE), *[("1", ORANGE)] * 2],
        "C": [None, ("prompt 4", BLUE), ("prompt 4", BLUE), ("prompt 2", BLUE), *[("1", ORANGE)] * 3],
        "D": [None, None, None, ("prompt 2", BLUE), *[("1", ORANGE)] * 3],
    }
    for line, (name, steps) in enumerate(rows.items()):
        y = 3.6 - line * 1.15
        ax.text(-0.6, y + 0.5, name, va="center", weight="bold")
        for step, cell in enumerate(steps):
            if cell is not None:
                box(ax, step * 2, y, cell[0], cell[1], 1.95)
    for step in range(7):
        ax.text(step * 2 + 1, 4.85, f"step {step + 1}", ha="center", fontsize=9)
    box(ax, 0, -1.15, "tokens of a prompt", BLUE, 4)
    box(ax, 4.3, -1.15, "one token of an answer", ORANGE, 4.6)
    ax.text(9.2, -0.65, "at most 6 tokens a step", va="center", fontsize=9)
    fig.subplots_adjust(0, 0, 1, 1)
    ax.set_xlim(-1, 14.2)
    ax.set_ylim(-1.3, 5.3)
    ax.set_aspect("equal")
    ax.axis("off")
    fig.savefig(HERE / "generation_batching.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(fig)


if __name__ == "__main__":
    kv_cache()
    paging()
    batching()
