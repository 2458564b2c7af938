"""The console that commands write their lines to."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console

# All C0 and C1 controls but tab and newline: a model, a row of data or a pasted text must not move the cursor or set
# the title.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain_console(*, stderr: bool = False, soft_wrap: bool = False, quiet: bool = False) -> Console:
    """A console that shows text as it is: a path such as runs/[new] is no markup, and numbers are not coloured."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, quiet=quiet, markup=False, highlight=False)


def printable(text: str) -> str:
    """The text without characters that command a terminal."""
    return _CONTROLS.sub("", text)


def escaped(text: str) -> str:
    """The text with such characters as Python writes them, `\\x1b`: for whoever wants to see what is there."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def tolerate_any_text() -> None:
    """Read bytes that are no text as U+FFFD and write what the terminal cannot show as `?`, instead of failing."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook put its own
            stream.reconfigure(errors="replace")


def program() -> str:
    """The program as its user can type it again: a virtual environment that is not activated is not on the PATH."""
    started, found = Path(sys.argv[0]), shutil.which("minnow")
    if found is not None and Path(found).resolve() == started.resolve():
        return "minnow"
    if started.name == "minnow" and started.is_file():
        return shlex.quote(str(started))
    return f"{shlex.quote(sys.executable)} -m minnow"
