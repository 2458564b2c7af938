"""A process of a test that fails, fails the test with its words."""

from __future__ import annotations

import signal
from typing import NoReturn

import pytest

from .imported import Forked, Imported, Program
from .processes import imported, run_processes


def test_what_failed_is_said() -> None:
    with pytest.raises(AssertionError, match=r"(?s)exit codes .*No module named tests\.nowhere"):
        run_processes("tests.nowhere", world_size=2)


def test_even_and_odd_ranks_are_of_two_processes() -> None:
    """Sets of text have one order in all that is forked of one process, and hide where ranks rely on it."""
    assert imported(0).process.pid != imported(1).process.pid


def test_an_interruption_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, or the time that a test may take: what it had started went on beside the tests that followed."""
    started: list[Forked] = []
    start = Imported.start

    def noted(parent: Imported, program: Program) -> Forked:
        started.append(start(parent, program))
        return started[-1]

    def interrupt(seconds: float) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(Imported, "start", noted)
    monkeypatch.setattr("tests.training.distributed.processes.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_processes("timeit", "-n1", "-r1", "import time; time.sleep(60)", world_size=2)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
