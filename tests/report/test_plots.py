"""Figures hold the records that they were given."""

from __future__ import annotations

from typing import Any

from minnow.report.plots import rollout_figure


def test_the_rollout_figure_draws_every_phase_and_every_examination() -> None:
    phases: list[dict[str, Any]] = [
        {
            "step": n,
            "reward": n / 10,
            "pass@1": n / 10,
            "pass@4": n / 5,
            "length": 9.0,
            "truncated": 0.0,
            "entropy": 0.4,
        }
        for n in range(5)
    ]
    updates: list[dict[str, Any]] = [
        {"step": 1, "loss": 0.1},
        {"step": 5, "held_out/reward": 0.2, "held_out/length": 9.0},
        {"step": 10, "held_out/reward": 0.6, "held_out/length": 8.0},
    ]
    figure = rollout_figure(phases, updates, "a run")
    drawn = {line.get_label(): list(line.get_xydata()[:, 1]) for axes in figure.axes for line in axes.get_lines()}
    assert drawn["pass@4"] == [n / 5 for n in range(5)]
    assert [list(line.get_ydata()) for line in figure.axes[1].get_lines()] == [[0.2, 0.6]]
    assert "KL to the reference (nats a token)" not in drawn
