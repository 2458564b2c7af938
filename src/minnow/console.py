"""The console that commands write their lines to."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console


def plain_console(*, stderr: bool = False, soft_wrap: bool = False, quiet: bool = False) -> Console:
    """A console that shows text as it is: a path such as runs/[new] is no markup, and numbers are not coloured."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, quiet=quiet, markup=False, highlight=False)


def program() -> str:
    """The program as its user can type it again: a virtual environment that is not activated is not on the PATH."""
    started, found = Path(sys.argv[0]), shutil.which("minnow")
    if found is not None and Path(found).resolve() == started.resolve():
        return "minnow"
    if started.name == "minnow" and started.is_file():
        return shlex.quote(str(started))
    return f"{shlex.quote(sys.executable)} -m minnow"
