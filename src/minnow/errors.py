"""The user's error."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do. Exit code 2."""


def first_line(error: Exception) -> str:
    """The first line of what a library's error says; its kind where it says nothing, as a time-out may."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
