"""Python in a closed room: another process without network, without your files, with little memory and little time.

For models that write programs. The code never runs in this process. Linux only: user, network and process namespaces
(`unshare`) cut every connection, a root folder of its own and Landlock (see `closed_room.py`) every file but Python's
own library, and resource limits stand on top. They bound each process: eight at once have as much memory each, and
System V's shared memory is bounded by the processor's time alone, and gone with the room. Where the kernel does not
give all of it the tool refuses to exist; it never runs code outside the room.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from pathlib import Path
from typing import IO

from minnow.config import UserError
from minnow.tools.tool import Tool, ToolError

MAX_OUTPUT = 2000
"""Characters of output that the model reads."""


def python_tool(*, seconds: int = 2, megabytes: int = 256) -> Tool:
    """A tool that runs a program and returns what it printed; UserError where no closed room can be had."""
    if not can_isolate():
        raise UserError(
            "the python tool needs Linux 5.13 or newer with Landlock and user namespaces that may mount "
            "(unshare --user --map-root-user --mount; Ubuntu from 24.04 on wants "
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0): it does not run code without them"
        )

    def python(code: str) -> str:
        return run_python(code, seconds=seconds, megabytes=megabytes)

    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "a program; print what you want to know"}},
        "required": ["code"],
    }
    return Tool("python", "Run a Python program without network or files and read what it prints.", parameters, python)


@lru_cache(maxsize=1)
def can_isolate() -> bool:
    """Whether a closed room can be had here: tried once, with an empty program."""
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        return False
    try:
        run_python("", seconds=5, megabytes=256)
    except ToolError:
        return False
    return True


_ROOM = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child"]
_FREE_CORES = threading.BoundedSemaphore(os.cpu_count() or 1)
"""Episodes step side by side; more programs than cores would each run out of a time that they never had."""
_PROGRAM = str(Path(__file__).with_name("closed_room.py"))


def run_python(code: str, *, seconds: int, megabytes: int) -> str:
    """Run `code`; what it printed, cut at MAX_OUTPUT. Raises ToolError with the last line of an exception or the limit
    met.

    Limits: CPU seconds and address space of each process, twice the seconds on the clock, 1 MB of output, 16 open
    files; 8 processes where the caller is not root, whom the kernel does not count. Nothing can be written but output.
    May be called on several threads: a program waits for a free core before its time begins.
    """
    # Output goes to files, which have a limit; a pipe would carry all of it into this process's memory.
    with (
        tempfile.TemporaryFile() as printed,
        tempfile.TemporaryFile() as complaints,
        tempfile.TemporaryDirectory(prefix="minnow-") as room,
        _FREE_CORES,
    ):
        try:
            result = subprocess.run(
                [*_ROOM, sys.executable, "-I", "-S", _PROGRAM, str(seconds), str(megabytes), room],
                stdout=printed,
                stderr=complaints,
                input=code.encode("utf-8", "replace"),
                cwd="/",
                env={},
                timeout=2 * seconds + 1,
            )
        except subprocess.TimeoutExpired:
            raise ToolError(f"stopped after {2 * seconds + 1} seconds") from None
        output, errors = _text(printed)[:MAX_OUTPUT], _text(complaints)
    if result.returncode == 0:
        return output.strip() or "(nothing was printed)"
    lines = errors.strip().splitlines()
    if not lines and result.returncode > 0:  # of its own accord
        raise ToolError(f"ended with exit status {result.returncode}")
    if not lines and result.returncode != -signal.SIGKILL:
        raise ToolError(f"crashed: {signal.strsignal(-result.returncode)}")
    if not lines or lines[-1].startswith("unshare:"):  # killed at a limit: there is no traceback
        raise ToolError(f"stopped: it took more than {seconds} seconds of computing, or wrote too much")
    raise ToolError(lines[-1][:200])


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
