"""The user's error."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do. Exit code 2."""


class UnusedSetting(UserError):  # noqa: N818 (it is a state of the configuration)
    """A setting that has no effect beside the others."""

    def __init__(self, message: str, name: str) -> None:
        """`name`: the setting's within its section."""
        super().__init__(message)
        self.name = name


def first_line(error: Exception) -> str:
    """The first line of what a library's error says; its kind where it says nothing, as a time-out may."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
