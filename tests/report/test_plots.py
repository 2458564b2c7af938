"""Figures hold the records that they were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minnow.config import UserError
from minnow.report.lineage import read_records, read_rollouts
from minnow.report.long_context import long_context_figure
from minnow.report.plots import comparison_figure, figures_of, pair_figure, rollout_figure, run_figure, save_figure
from minnow.stages import report

pytestmark = pytest.mark.usefixtures("drawn")


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
        {"step": 5, "held_out/reward": 0.2, "held_out/tokens": 9.0},
        {"step": 10, "held_out/reward": 0.6, "held_out/tokens": 8.0},
    ]
    figure = rollout_figure(phases, updates, "a run")
    drawn = {line.get_label(): list(line.get_xydata()[:, 1]) for axes in figure.axes for line in axes.get_lines()}
    assert drawn["pass@4"] == [n / 5 for n in range(5)]
    assert [list(line.get_ydata()) for line in figure.axes[1].get_lines()] == [[0.2, 0.6]]
    assert "KL to the reference (nats a token)" not in drawn


def test_the_rollout_figure_has_a_colour_for_every_reward() -> None:
    names = ["reward", "pass@1", "pass@8", *(f"reward/{name}" for name in "abcdef")]
    held_out = [f"held_out/{name}" for name in ("reward", "a", "b", "c", "d", "pass@1", "pass@8")]
    figure = rollout_figure([{"step": 0} | dict.fromkeys(names, 0.5)], [{"step": 1} | dict.fromkeys(held_out, 0.5)], "")
    for axes, drawn in zip(figure.axes[:2], (names, held_out), strict=True):
        lines = {line.get_label(): line.get_color() for line in axes.get_lines()}
        assert set(lines) >= {name.removeprefix("held_out/") for name in drawn}
        assert len(set(lines.values())) == len(drawn)


def test_the_figure_of_a_run_on_pairs_draws_what_was_held_out() -> None:
    training = [
        {"step": n, "loss": 0.7 - n / 100, "accuracy": n / 10, "lr": 1e-4, "grad_norm": 1.0} for n in range(1, 9)
    ]
    held_out = [{"step": 8, "validation_loss": 0.4, "validation_accuracy": 0.9, "validation_chosen_reward": 2.5}]
    loss, accuracy, rewards, _, _ = pair_figure([*training, *held_out], "a run").axes
    assert [list(line.get_ydata()) for line in accuracy.get_lines()] == [[n / 10 for n in range(1, 9)], [0.9]]
    assert [line.get_label() for line in rewards.get_lines()] == ["chosen reward"]
    assert list(loss.get_lines()[1].get_ydata()) == [0.4]
    assert loss.get_ylabel() == "nats per pair"


def test_a_run_is_drawn_by_what_it_did() -> None:
    losses = [{"step": 1, "loss": 0.5, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 9.0}]
    phase = {"step": 0, "reward": 0.5, "length": 3.0, "truncated": 0.0, "equal_groups": 0.0, "entropy": 0.1}
    phase |= {"repetition": 0.0, "pass@1": 0.5}
    titles = [[axes.get_title() for axes in figure.axes] for figure in figures_of(losses, [phase], "a run")]
    assert "rollouts" in titles[0]  # a card shows the first
    assert "bits per byte" not in titles[1]  # no panel stands empty
    (pairs,) = figures_of([losses[0] | {"accuracy": 0.5, "validation_accuracy": 0.5}], [], "a run")
    assert "accuracy" in [axes.get_title() for axes in pairs.axes]
    (language,) = figures_of([losses[0], {"step": 1, "bits_per_byte": 1.0}], [], "a run")
    assert "bits per byte" in [axes.get_title() for axes in language.axes]


def test_long_curves_are_smoothed_over_what_came_before() -> None:
    """Of 200 points each is the mean of five (a fortieth), of 39 every one is drawn as it is."""
    records = [{"step": step, "loss": float(step % 10), "lr": 0.1} for step in range(1, 201)]
    raw, smooth = run_figure(records, "a run").axes[0].get_lines()
    assert list(raw.get_ydata()) == [record["loss"] for record in records]
    assert list(smooth.get_ydata())[:6] == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    assert list(smooth.get_ydata())[-1] == (6 + 7 + 8 + 9 + 0) / 5
    (alone,) = run_figure(records[:39], "a run").axes[0].get_lines()
    assert list(alone.get_ydata()) == [record["loss"] for record in records[:39]]


def test_long_context_stands_at_the_middle_of_its_positions() -> None:
    bits = {"as it is/0-64": 2.0, "as it is/64-128": 3.0, "as it is/all": 2.5, "yarn/0-64": 1.0}
    facts = {"as it is/64": 0.5, "as it is/128": 0.25}
    bars = [{name: {"value": value} for name, value in each.items()} for each in (bits, facts)]
    by_position, by_length = long_context_figure(*bars, trained=64, title="a model").axes
    drawn = [
        {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()} for axes in (by_position, by_length)
    ]
    assert drawn[0]["as it is"] == [[32.0, 2.0], [96.0, 3.0]]
    assert drawn[0]["yarn"] == [[32.0, 1.0]]
    assert drawn[1]["as it is"] == [[64.0, 0.5], [128.0, 0.25]]
    assert {x for x, _ in drawn[0]["trained length"]} == {64.0}


@pytest.mark.filterwarnings("error")
def test_a_run_that_taught_nothing_is_drawn_without_a_warning(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 0.0, "lr": 0.1, "grad_norm": 0.0, "tokens_per_second": 9.0} for step in (1, 2)]
    save_figure(run_figure(records, "a run"), tmp_path / "curves.png")


def test_runs_are_compared_by_what_all_of_them_held_out() -> None:
    alone = [{"step": 5, "validation_loss": 2.0, "bits_per_byte": 1.0}, {"step": 9, "validation_loss": 1.5}]
    taught = [{"step": 5, "validation_loss": 1.0}, {"step": 6, "loss": 3.0}]
    (panel,) = comparison_figure({Path("work/alone-0/pretrain"): alone, Path("work/taught-0/pretrain"): taught}).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
    assert drawn == {"alone-0": [2.0, 1.5], "taught-0": [1.0]}
    with pytest.raises(UserError, match="no held-out figure"):
        comparison_figure({Path("a"): alone, Path("b"): [{"step": 1, "loss": 1.0}]})


def test_runs_of_reinforcement_are_compared_by_their_held_out_reward() -> None:
    """A run and a stage inside it are told apart too."""
    records = [{"step": 5, "held_out/reward": 0.25}, {"step": 9, "held_out/reward": 0.5}]
    (panel,) = comparison_figure({Path("work/rl"): records, Path("work/rl/again"): records}).axes
    assert panel.get_title() == "held-out reward"
    drawn = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
    assert drawn == {"rl": [0.25, 0.5], "again": [0.25, 0.5]}


def write_runs(folder: Path, *names: str) -> None:
    """Runs of one update."""
    line = '{"step": 1, "loss": 2.0, "validation_loss": 2.0, "tokens_per_second": 9.0, "mfu": 0.1, "tokens": 5, '
    line += '"seconds": 1.0, "memory_gb": 1.0, "lr": 0.1, "grad_norm": 1.0}\n'
    for name in names:
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").write_text(line)
        (folder / name / "config.yaml").write_text("run: x\n")


def test_the_report_command_draws_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, "a", "b")
    one, both = str(tmp_path / "one.svg"), str(tmp_path / "both.png")
    report.run(report.Config(run=str(tmp_path / "a"), plot=one))
    report.run(report.Config(run=str(tmp_path / "a"), plot=both, beside=(str(tmp_path / "b"),)))
    written = str(tmp_path / "a" / "report.html")
    assert capsys.readouterr().out.split() == [written, one, written, both]
    assert Path(one).read_text().startswith("<?xml")
    assert Path(both).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--plot FILE"):
        report.run(report.Config(run=str(tmp_path / "a"), beside=(str(tmp_path / "b"),)))
    with pytest.raises(UserError, match="holds no metrics.jsonl"):
        report.run(report.Config(run=str(tmp_path / "a"), plot=one, beside=(str(tmp_path),)))


def test_the_report_command_draws_what_tells_most_and_the_run_itself_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that practised its rollouts, not its loss; beside others it has the first colour."""
    write_runs(tmp_path, "b", "a")
    drawn: list[Any] = []
    monkeypatch.setattr(report, "write_report", lambda run: run)
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure))
    report.run(report.Config(run=str(tmp_path / "b"), plot="x.svg", beside=(str(tmp_path / "a"),)))
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["b", "a"]
    phase = '{"step": 1, "reward": 0.5, "pass@1": 0.5, "pass@4": 0.5, "length": 9.0, "truncated": 0.0, "entropy": 0.4}'
    (tmp_path / "b" / "rollouts.jsonl").write_text(phase + "\n")
    report.run(report.Config(run=str(tmp_path / "b"), plot="x.svg"))
    run = tmp_path / "b"
    expected = rollout_figure(read_rollouts(run), read_records(run / "metrics.jsonl"), "b")
    assert [axes.get_title() for axes in drawn[1].axes] == [axes.get_title() for axes in expected.axes]
