"""A newcomer's two commands, as make would run them, without installing anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout in which nothing is installed yet."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PIP_ARGS", "ARGS")
    }
    command = ["make", *words]
    return subprocess.run(command, cwd=folder, env=settings | environment, capture_output=True, text=True, timeout=60)


def commands(folder: Path, *words: str) -> list[str]:
    """What would be run."""
    shown = make(folder, "--dry-run", *words)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "installs", "runs"),
    [
        (["quickstart", "ARGS=--minutes 4"], "--editable .", ".venv/bin/minnow quickstart --minutes 4"),
        (["test"], "--editable '.[dev]'", ".venv/bin/python -m pytest -n 2"),
    ],
)
def test_an_environment_is_made_and_filled_and_then_the_work_done(
    clone: Path, words: list[str], installs: str, runs: str
) -> None:
    lines = commands(clone, *words, "PIP_ARGS=--extra-index-url https://example.org/cpu")
    (made,) = (number for number, line in enumerate(lines) if line.endswith("-m venv .venv"))
    ((filled, install),) = ((number, line) for number, line in enumerate(lines) if "pip install" in line)
    assert install.endswith(installs)
    assert "--extra-index-url https://example.org/cpu" in install
    assert "--constraint constraints.txt" in install
    assert made < filled < lines.index(runs) == len(lines) - 1


def test_what_is_installed_is_not_installed_again(clone: Path) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/python").touch()
    for stamp in ("base.stamp", "all.stamp"):
        (clone / ".venv" / stamp).touch()
    for target in ("quickstart", "test"):
        assert not any("pip install" in line for line in commands(clone, target))
    os.utime(clone / ".venv/all.stamp", (0, 0))  # older than constraints.txt
    assert any("pip install" in line for line in commands(clone, "test"))


def test_every_extra_is_installed_for_the_tests() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (named,) = re.findall(r"minnow\[(.*?)\]", " ".join(extras["dev"]))
    assert set(named.split(",")) == set(extras) - {"dev"}


def test_without_a_compiler_a_note_says_so(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for program in ("make", "sh"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program) or "")
    without = make(clone, "compiler", PATH=str(tmp_path / "bin"))
    assert (without.returncode, without.stderr) == (0, "")
    assert "no C++ compiler found; everything works" in without.stdout
    (tmp_path / "bin" / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "g++").chmod(0o755)
    assert "note" not in make(clone, "compiler", PATH=str(tmp_path / "bin")).stdout


@pytest.mark.parametrize(("minor", "is_too_old"), [(10, True), (11, False), (14, False)])
def test_an_old_python_is_refused_in_words(clone: Path, minor: int, is_too_old: bool) -> None:
    check = f'"{sys.executable}" -c "import sys; sys.version_info = (3, {minor}, 1); exec(sys.argv[1])"'
    python = f'case $1 in --version) echo Python 3.{minor}.1;; -c) {check} "$2";; *) mkdir -p .venv/bin;; esac'
    (clone / "python").write_text(f"#!/bin/sh\n{python}\n")
    (clone / "python").chmod(0o755)
    done = make(clone, ".venv/bin/python", "PYTHON=./python")
    assert (clone / ".venv").exists() is not is_too_old
    told = "minnow needs Python 3.11 or newer; ./python is Python 3.10.1. Name a newer one: make PYTHON=python3.12"
    assert (done.returncode != 0, told in done.stderr) == (is_too_old, is_too_old)


def test_continuous_integration_lints_and_tests() -> None:
    assert "\nmake lint test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    shown = " ".join(commands(ROOT, "lint"))
    assert all(tool in shown for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports"))
