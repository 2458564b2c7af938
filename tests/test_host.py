"""The memory of a machine, and of a container on it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from minnow.host import host_memory, peak_memory

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("536870912\n", 536870912),
        ("max\n", MACHINE),  # version 2: no limit
        ("9223372036854771712\n", MACHINE),  # version 1: no limit
    ],
)
def test_the_smaller_of_machine_and_container(tmp_path: Path, name: str, text: str, expected: int) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert host_memory(tmp_path) == expected


def test_a_machine_without_containers(tmp_path: Path) -> None:
    assert host_memory(tmp_path / "nothing") == MACHINE


def test_the_most_memory_that_was_held() -> None:
    before = peak_memory()
    assert 0 < before <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    held = b"\1" * (before + 2**20)  # more than all that was held so far, whatever was given back since
    assert peak_memory() >= before + 2**20 * bool(held)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's exec hands the figure on")
def test_memory_of_the_process_that_started_this_one_is_not_its_own() -> None:
    """A run that a notebook of 2 GB started had a `memory_gb` of 2 in all its lines."""
    held = b"\1" * 2**28
    words = [sys.executable, "-c", "from minnow.host import peak_memory; print(peak_memory())"]
    assert int(subprocess.run(words, check=True, capture_output=True).stdout) < len(held)


def test_peak_memory_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no `resource`; psutil tells the peak there alone."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5 * 2**30))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() == 5 * 2**30
