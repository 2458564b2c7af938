"""A process that has imported torch and minnow, from which others are forked: each starts without seconds of imports.

What is forked is a process of its own in all else: its environment, its output, its end.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from tests.pictures import do_not_draw

ROOT = Path(__file__).parents[3]
MODULES = ("torch._dynamo", "torch.testing", "minnow.stages.distill_on_policy", "minnow.stages.dpo", "minnow.stages.rl")


@dataclass(frozen=True)
class Program:
    """`python -m MODULE ARGUMENTS`."""

    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    output: Path
    """File for what it says."""


@dataclass
class Forked:
    """What a `subprocess.Popen` would be, of a process that `Imported` has forked."""

    pid: int
    parent: Imported
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.parent.read_ends()
            self.returncode = self.parent.ended.pop(self.pid, None)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            self.parent.ends.poll(None)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGKILL)


@dataclass
class Imported:
    """The process that has imported all; it ends with the one that started it."""

    ended: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.programs, programs = Pipe()
        self.ends, ends = Pipe()
        files = (programs.fileno(), ends.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, files)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
            pass_fds=files,
        )
        programs.close()
        ends.close()

    def start(self, program: Program) -> Forked:
        self.programs.send(program)
        return Forked(self.programs.recv(), self)

    def read_ends(self) -> None:
        while self.ends.poll():
            pid, code = self.ends.recv()
            self.ended[pid] = code


def next_program(programs: Connection, ends: Connection) -> Program | None:
    """Fork a process for each program that comes, and return the program in it. Here return None when no more come."""
    running: set[int] = set()
    while True:
        if programs.poll(0.02 if running else None):
            try:
                program: Program = programs.recv()
            except EOFError:
                return None
            pid = os.fork()
            if pid == 0:
                programs.close()
                ends.close()
                return program
            running.add(pid)
            programs.send(pid)
        for pid in sorted(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.remove(pid)
                ends.send((pid, os.waitstatus_to_exitcode(status)))


def main(programs: str, ends: str) -> None:
    for module in MODULES:
        __import__(module)
    do_not_draw()
    program = next_program(Connection(int(programs)), Connection(int(ends)))
    if program is None:
        return
    os.environ.clear()
    os.environ.update(program.environment)
    file = os.open(program.output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [program.module, *program.arguments]
    runpy.run_module(program.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
