"""The memory of a machine, and of a container on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minnow.host import host_memory

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
