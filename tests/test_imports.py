"""Every module imports, on its own; and the repository names nothing of the machine it was written on."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

import minnow

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(minnow.__path__, "minnow.") if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_imports(name: str) -> None:
    importlib.import_module(name)


def test_what_only_unix_has_is_imported_where_it_is_used() -> None:
    """`import resource` at the head of two modules kept every command that computes from starting on Windows."""
    only_unix = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
    package = Path(minnow.__path__[0])
    for file in sorted(package.rglob("*.py")):
        if file.name == "closed_room.py":  # a program for Linux, which nothing imports
            continue
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in statement.names} | {getattr(statement, "module", None)}
                assert not names & only_unix, f"{file.relative_to(package)}:{statement.lineno}"


def _tracked_text_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and b"\0" not in file.read_bytes()[:8192]]


def test_names_no_machine_paths() -> None:
    # Split so that this file does not name them either.
    absolute = re.compile(r"(?<![\w.])/(?:" + "work" + r"/|root/|home/\w|Users/\w|tmp/minnow)")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for file in _tracked_text_files()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if absolute.search(line) and file != Path(__file__)
    ]
    assert not found, "\n".join(found)
