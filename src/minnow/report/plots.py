"""Curves of a run, as figures a person can look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minnow.config import UserError
from minnow.disk import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

_HELD_OUT = {
    "validation_loss": "held-out loss",
    "bits_per_byte": "held-out bits per byte",
    "validation_accuracy": "held-out accuracy",
    "held_out/reward": "held-out reward",
}
"""Figures of a validation in metrics.jsonl, and what to call them."""

BLUE, ORANGE, GREEN = "#1f6f8b", "#d9822b", "#5b8c5a"


def figures_of(records: Sequence[Record], rollouts: Sequence[Record], title: str) -> list[Figure]:
    """The figures that fit what a run did, the telling one first.

    records: lines of metrics.jsonl; rollouts: of rollouts.jsonl, none unless the run practised.
    """
    draw = pair_figure if learns_from_pairs(records) else run_figure
    figures = [draw(records, title)]
    return [rollout_figure(rollouts, records, title), *figures] if rollouts else figures


def learns_from_pairs(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are lines of a run on preference pairs."""
    return any("accuracy" in record for record in records)


def run_figure(records: Sequence[Record], title: str) -> Figure:
    """Four panels: loss, bits per byte, learning rate with gradient norm, tokens per second."""
    figure = new_figure(11, 6.5)
    figure.suptitle(title)
    (loss, bits), (rate, speed) = figure.subplots(2, 2)
    _curve(loss, records, "loss", BLUE, label="training", smooth=True)
    _curve(loss, records, "validation_loss", ORANGE, label="held out")
    loss.set(title="loss", ylabel="nats per token")
    _curve(bits, records, "bits_per_byte", ORANGE, label="held out")
    bits.set(title="bits per byte", ylabel="bits per UTF-8 byte")
    _rate_and_norm(rate, records)
    _curve(speed, records, "tokens_per_second", BLUE, label="tokens/s", smooth=True)
    speed.set(title="speed", ylabel="tokens per second", ylim=(0, None))
    for axes in (loss, bits, rate, speed):
        axes.set_xlabel("update")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="upper right")
    if not any("bits_per_byte" in record for record in records):  # reinforcement has none
        bits.remove()
    return figure


def pair_figure(records: Sequence[Record], title: str) -> Figure:
    """Four panels of a run on pairs (preferences, a reward model): loss, accuracy, rewards, learning rate."""
    figure = new_figure(11, 6.5)
    figure.suptitle(title)
    (loss, accuracy), (rewards, rate) = figure.subplots(2, 2)
    _curve(loss, records, "loss", BLUE, label="training", smooth=True)
    _curve(loss, records, "validation_loss", ORANGE, label="held out")
    loss.set(title="loss", ylabel="nats per pair")
    _curve(accuracy, records, "accuracy", BLUE, label="training", smooth=True)
    _curve(accuracy, records, "validation_accuracy", ORANGE, label="held out")
    _curve(accuracy, records, "validation_likelihood_accuracy", GREEN, label="held out, by likelihood alone")
    accuracy.set(title="accuracy", ylabel="share of pairs", ylim=(-0.02, 1.02))
    for key, colour in (("margin", BLUE), ("chosen_reward", GREEN), ("rejected_reward", ORANGE), ("reward", GREEN)):
        _curve(rewards, records, f"validation_{key}", colour, label=key.replace("_", " "))
    rewards.set(title="rewards of held-out pairs", ylabel="mean")
    _rate_and_norm(rate, records)
    for axes in (loss, accuracy, rewards, rate):
        axes.set_xlabel("update")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="best")
    return figure


def comparison_figure(runs: Mapping[Path, Sequence[Record]]) -> Figure:
    """Held-out curves of several runs in the same axes: a panel for each figure that all of them have.

    runs: lines of metrics.jsonl by run folder. Runs are named by what tells their paths apart. UserError where they
    have nothing in common.
    """
    panels = {key: title for key, title in _HELD_OUT.items() if all(_has(records, key) for records in runs.values())}
    if not panels:
        raise UserError(f"{', '.join(map(str, runs))}: no held-out figure stands in the metrics of all of them")
    names = _short_names(list(runs))
    figure = new_figure(5.5 * len(panels), 3.8)
    for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (name, records) in enumerate(zip(names, runs.values(), strict=True)):
            _curve(axes, records, key, f"C{i}", label=name)
        axes.set(title=title, xlabel="update")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty one, in inches. A command that draws nothing is spared the second that matplotlib takes to import."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _has(records: Sequence[Record], key: str) -> bool:
    return any(record.get(key) is not None for record in records)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The parts of paths in which they differ."""
    parts = [path.resolve().parts for path in paths]
    shared = {part for part in parts[0] if all(part in each for each in parts)}
    return ["/".join(part for part in each if part not in shared) or each[-1] for each in parts]


def rollout_figure(phases: Sequence[Record], updates: Sequence[Record], title: str) -> Figure:
    """Four panels of a run of reinforcement learning: rewards, held-out rewards, endings, and signs of a collapse.

    phases: lines of rollouts.jsonl; updates: lines of metrics.jsonl.
    """
    figure = new_figure(11, 6.5)
    figure.suptitle(title)
    (reward, held_out), (length, health) = figure.subplots(2, 2)
    asked = dict.fromkeys(key for record in phases for key in record)
    judged = [key for key in asked if key.startswith(("pass@", "reward/"))]
    for i, key in enumerate(("reward", *judged)):
        _curve(reward, phases, key, f"C{i}", label=key, smooth=True)
    reward.set(title="rollouts", ylabel="mean of a phase")
    names = dict.fromkeys(key for record in updates for key in record if key.startswith("held_out/"))
    for i, key in enumerate(name for name in names if name != "held_out/tokens"):
        _curve(held_out, updates, key, f"C{i}", label=key.removeprefix("held_out/"))
    held_out.set(title="held-out prompts, answered greedily (pass@K: drawn)", ylabel="mean of a validation")
    _curve(length, phases, "length", BLUE, label="tokens of an answer", smooth=True)
    shares = length.twinx()
    _curve(shares, phases, "truncated", ORANGE, label="cut off")
    _curve(shares, phases, "equal_groups", GREEN, label="groups without contrast")
    length.set(title="length, and shares of the answers", ylabel="tokens", ylim=(0, None))
    shares.set(ylabel="share", ylim=(-0.02, 1.02))
    shares.legend(frameon=False, loc="center left")
    _curve(health, phases, "entropy", BLUE, label="entropy (nats a token)", smooth=True)
    _curve(health, phases, "kl_to_reference", ORANGE, label="KL to the reference (nats a token)", smooth=True)
    _curve(health, phases, "repetition", GREEN, label="repetition (0 to 1)")
    health.set(title="signs of a collapse")
    for axes in (reward, held_out, length, health):
        axes.set_xlabel("update" if axes is held_out else "phase")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="best")
    return figure


def _rate_and_norm(rate: Axes, records: Sequence[Record]) -> None:
    _curve(rate, records, "lr", BLUE, label="learning rate")
    norm = rate.twinx()
    _curve(norm, records, "grad_norm", ORANGE, label="gradient norm")
    rate.set(title="learning rate and gradient norm", ylabel="learning rate")
    some = any((record.get("grad_norm") or 0) > 0 for record in records)  # an axis of zeros has no logarithm
    norm.set(ylabel="gradient norm", yscale="log" if some else "linear")


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, or as SVG to a path that ends so."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="svg" if path.suffix == ".svg" else "png", dpi=110)


def _curve(axes: Axes, records: Sequence[Record], key: str, colour: str, *, label: str, smooth: bool = False) -> None:
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    few = len(points) < 40
    axes.plot(
        steps,
        values,
        color=colour,
        alpha=0.3 if smooth and not few else 1,
        lw=1.2,
        marker="." if few else "",
        label=label,
    )
    if smooth and not few:
        axes.plot(steps, _moving_average(values, max(5, len(values) // 40)), color=colour, lw=1.8)


def _moving_average(values: Sequence[float], window: int) -> list[float]:
    averages = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        averages.append(sum(recent) / len(recent))
    return averages
