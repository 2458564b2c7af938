"""The screen of `minnow watch`: what is drawn, from the logs alone."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from minnow.report.dashboard import Chart, RunView, bars, column_means, dashboard, state_of, value_range


def screen(*views: RunView, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(dashboard(views))
    return console.file.getvalue()  # type: ignore[attr-defined]


def update(step: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    # 10 updates in all, 30 s each.
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 0.5,
        "lr": 0.001,
        "tokens": 1000 * step,
        "tokens_per_second": 12345.6,
        "mfu": 0.314,
        "memory_gb": 1.5,
        "eta_seconds": 30.0 * (10 - step),
        "seconds": 30.0,
    } | more


BEAT = {"step": 5, "total_steps": 10, "state": "training", "stall_seconds": 60.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "running"),
        ({"age": 61.0}, "stalled"),
        ({"age": 61.0, "beat": BEAT | {"stall_seconds": 0}}, "running"),  # the detector is off: 300 s
        ({"age": 301.0, "beat": BEAT | {"stall_seconds": 0}}, "stalled"),
        ({"is_alive": False}, "killed"),
        ({"beat": BEAT | {"state": "stopped"}, "is_alive": False, "age": 1e6}, "stopped"),
        ({"beat": BEAT | {"state": "failed"}}, "failed"),
        ({"beat": None}, "no heartbeat"),
        ({"has_model": True, "is_alive": False}, "finished"),
    ],
)
def test_the_state(changes: dict[str, Any], expected: str) -> None:
    given: dict[str, Any] = {"beat": BEAT, "has_model": False, "age": 1.0, "is_alive": True, "default_stall": 300.0}
    assert state_of(**given | changes) == expected


def test_bars_by_hand() -> None:
    # Two rows are 16 eighths. Of the range 0 to 4: 0 is one eighth (to be seen at all), 1 is 4, 2 is 8, 4 is 16.
    assert bars([0.0, 1.0, 2.0, 4.0], 2) == ["   █", "▁▄██"]
    # 3 of 0 to 4 is 12 eighths: a full row and half of one.
    assert bars([0.0, 3.0, 4.0], 2) == [" ▄█", "▁██"]
    assert bars([7.0, 7.0], 1) == ["▄▄"]  # all alike stand half high


def test_columns_are_means_of_their_share() -> None:
    assert column_means([0.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0], 4) == [0.5, 2.0, 3.0, 4.0]
    assert column_means([4.0, 0.0], 4) == [4.0, 4.0, 0.0, 0.0]
    # Three values in two columns: the middle one belongs to both.
    assert column_means([1.0, 2.0, 3.0], 2) == [1.5, 2.5]


def test_the_fall_at_the_beginning_does_not_flatten_the_rest() -> None:
    assert value_range([9.0, *[2.0, 1.0] * 10]) == (1.0, 2.0)
    assert value_range([9.0, 1.0]) == (1.0, 9.0)


def test_the_screen_of_a_running_run() -> None:
    lines = [update(step, 6.0 - step) for step in range(1, 5)]
    lines += [{"step": 4, "validation_loss": 2.25, "bits_per_byte": 1.125}, update(5, 1.0)]
    view = RunView("runs/a", updates=lines, state="running", beat=BEAT, age=3.0)
    text = screen(view)
    assert "running, heartbeat 3 s ago  runs/a" in text
    assert "5/10  50%  2:30 left" in text  # 5 updates of 30 s
    assert "loss 1.0000  lr 0.001  gradient norm 0.5" in text
    assert "12,346 tokens/s  31.4% of the matmul peak  30 s an update" in text
    assert "5,000 tokens  peak memory 1.50 GB" in text
    assert "update 4  validation_loss 2.25  bits_per_byte 1.125" in text
    assert "held-out bits per byte  1.125" in text


def test_the_heartbeat_counts_updates_that_are_not_logged_yet() -> None:
    view = RunView("a", updates=[update(2)], state="running", beat=BEAT | {"step": 6})
    assert "6/10  60%  2:00 left" in screen(view)


def test_the_time_left_goes_by_the_latest_updates() -> None:
    """Fifty of them: a slow beginning (compilation, another load) is over."""
    steps = range(1, 101)
    lines = [update(n, seconds=60.0 if n <= 50 else 2.0) | {"eta_seconds": 2.0 * (200 - n)} for n in steps]
    view = RunView("a", updates=lines, state="running", beat=BEAT | {"step": 100})
    assert "100/200  50%  3:20 left" in screen(view)


@pytest.mark.parametrize("state", ["stopped", "killed", "failed"])
def test_a_run_that_stands_still_has_no_time_left(state: Any) -> None:
    assert "left" not in screen(RunView("a", updates=[update(5)], state=state, beat=BEAT))


def test_the_screen_of_a_run_of_rollouts() -> None:
    phases = [
        {
            "step": 0,
            "updates": 0,
            "reward": 0.25,
            "pass@1": 0.5,
            "entropy": 1.5,
            "repetition": 0.1,
            "sample": {"text": "[bold]"},
        }
    ]
    text = screen(RunView("rl", updates=[update(1, grad_norm=None)], phases=phases, state="running", beat=BEAT))
    assert "reward of the rollouts  0.25" in text
    assert "phase 0  reward 0.25  pass@1 0.5  entropy 1.5  repetition 0.1" in text
    assert "gradient norm nan" in text


def test_two_charts_are_enough_and_rewards_go_before_what_was_held_out() -> None:
    lines = [update(1), {"step": 1, "validation_loss": 2.5, "bits_per_byte": 1.25}]
    view = RunView("rl", updates=lines, state="running", beat=BEAT)
    text = screen(view)
    assert "held-out bits per byte  1.25" in text
    assert "held-out loss" not in text
    view.phases.append({"step": 0, "reward": 0.25, "reward/length": 0.125})
    text = screen(view)
    assert "reward of the rollouts  0.25" in text
    assert "held-out bits" not in text
    assert "phase 0  reward 0.25\n" in "\n".join(line.strip("│ ") for line in text.splitlines()) + "\n"


def test_a_chart_says_its_range_and_its_last_value() -> None:
    console = Console(file=io.StringIO(), width=40)
    console.print(Chart("loss", [4.0, 1.0, 2.5]))
    heading, top, *_, bottom = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert heading.rstrip() == "loss  2.5"
    assert (top.split()[0], bottom.split()[0]) == ("4", "1")


def test_a_line_without_a_number_is_no_update() -> None:
    """A loss that was not finite is null in the log; the last one that was is shown."""
    view = RunView("a", updates=[update(4, 1.5), update(5) | {"loss": None}], state="failed", beat=BEAT)
    assert "loss 1.5000" in screen(view)
    assert view.validations == []


@pytest.mark.parametrize("state", ["trained", "finished"])
def test_a_run_that_is_done_has_no_heartbeat_to_look_at(state: Any) -> None:
    text = screen(RunView("a", updates=[update(10)], state=state, beat=BEAT, age=9e5))
    assert f"{state}  a" in text
    assert "ago" not in text


def test_earlier_stages_take_a_line_each() -> None:
    done = RunView("q/pretrain", updates=[update(10), {"step": 10, "validation_loss": 1.5}], state="finished")
    text = screen(done, RunView("q/sft", state="running", beat=BEAT))
    assert text.startswith("q/pretrain  finished  10 updates  loss 2.0000  validation_loss 1.5\n")
    assert "no update yet" in text
    assert "nothing is trained here yet" in screen()


@pytest.mark.parametrize("width", [40, 60, 200])
def test_it_fits_the_terminal(width: int) -> None:
    lines = [update(step) for step in range(1, 9)] + [{"step": 8, "validation_loss": 2.0, "bits_per_byte": 1.0}]
    text = screen(RunView("runs/a", updates=lines, state="running", beat=BEAT), width=width)
    assert max(map(len, text.splitlines())) <= width
