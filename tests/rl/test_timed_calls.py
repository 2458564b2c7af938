"""Calls side by side under a time limit: order, lateness, exceptions, and a process that can end."""

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from minnow.config import UserError
from minnow.rl.rollouts import RolloutConfig
from minnow.rl.timed_calls import run_all, where


def test_results_come_in_the_order_of_the_calls_and_not_of_their_arrival():
    def call(place):
        time.sleep(0.05 * (4 - place))
        return place

    assert run_all([lambda n=n: call(n) for n in range(4)], seconds=60, threads=4) == [0, 1, 2, 3]
    assert run_all([], seconds=60, threads=4) == []


def test_calls_run_side_by_side_and_never_more_than_allowed():
    barrier = threading.Barrier(3)
    assert len(run_all([barrier.wait] * 6, seconds=60, threads=3)) == 6  # would wait for ever one after the other
    running, most, lock = [], [], threading.Lock()

    def call():
        with lock:
            running.append(1)
            most.append(len(running))
        time.sleep(0.01)
        with lock:
            running.pop()

    run_all([call] * 8, seconds=60, threads=2)
    assert max(most) == 2


def test_what_hangs_is_given_up_and_the_rest_goes_on():
    """Two threads, three that hang among seven: a late one frees its place."""
    forever = threading.Event()
    calls = [forever.wait if n in (0, 1, 4) else (lambda n=n: n) for n in range(7)]
    outcomes = run_all(calls, seconds=0.3, threads=2)
    assert [o for o in outcomes if not isinstance(o, TimeoutError)] == [2, 3, 5, 6]
    assert [n for n, o in enumerate(outcomes) if isinstance(o, TimeoutError)] == [0, 1, 4]
    forever.set()


def test_the_time_of_a_call_begins_when_it_runs_and_not_when_it_waits():
    outcomes = run_all([lambda: time.sleep(0.4)] * 4, seconds=1.0, threads=1)
    assert outcomes == [None] * 4


def test_exceptions_are_outcomes_even_one_that_would_end_a_thread():
    outcomes = run_all([lambda: 1 / 0, sys.exit, lambda: 3], seconds=60, threads=2)
    assert isinstance(outcomes[0], ZeroDivisionError)
    assert isinstance(outcomes[1], SystemExit)
    assert outcomes[2] == 3
    assert where(outcomes[0]).startswith("ZeroDivisionError: division by zero (")
    assert "test_timed_calls.py:" in where(outcomes[0])


def test_a_process_ends_though_a_thread_hangs():
    script = """
        import threading
        from minnow.rl.timed_calls import run_all
        print(run_all([threading.Event().wait], seconds=0.1, threads=1))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "took more than 0.1 seconds" in done.stdout


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_time_limit_is_one(seconds):
    with pytest.raises(UserError, match=r"rollout.environment_seconds is"):
        RolloutConfig(environment_seconds=seconds)
