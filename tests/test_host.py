"""The memory of a machine, and of a container on it."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_memory() == (peak if sys.platform == "darwin" else peak * 1024)


def test_memory_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has neither `resource` nor `sysconf`, and its functions fill structures: the offsets are those of its headers
    on 64 bits."""

    def fill(place: Any, size: int, offset: int, value: int) -> int:
        memory = (ctypes.c_char * size).from_address(ctypes.addressof(place._obj))
        assert int.from_bytes(memory[:4], sys.byteorder) == size  # what tells the version of the structure
        memory[offset : offset + 8] = value.to_bytes(8, sys.byteorder)
        return 1

    kernel32 = SimpleNamespace(
        GlobalMemoryStatusEx=lambda place: fill(place, 64, 8, 16 * 2**30),
        K32GetProcessMemoryInfo=lambda process, place, size: fill(place, 72, 8, 5 * 2**30),
    )
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert host_memory(tmp_path) == 16 * 2**30
    assert peak_memory() == 5 * 2**30
