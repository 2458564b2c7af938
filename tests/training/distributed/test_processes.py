"""A process of a test that fails, fails the test with its words."""

from __future__ import annotations

import pytest

from .processes import imported, run_processes


def test_what_failed_is_said() -> None:
    with pytest.raises(AssertionError, match=r"(?s)exit codes .*No module named tests\.nowhere"):
        run_processes("tests.nowhere", world_size=2)


def test_even_and_odd_ranks_are_of_two_processes() -> None:
    """Sets of text have one order in all that is forked of one process, and hide where ranks rely on it."""
    assert imported(0).process.pid != imported(1).process.pid
