"""What this process may use of its host: cores and memory."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import psutil

_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Where a container finds its own limit, in cgroups v2 and v1."""


def num_cores() -> int:
    """Return the cores that this process may use; all there are on a system that does not tell (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of the machine, or of the container where that has less."""
    sizes: list[int] = [psutil.virtual_memory().total]
    for name in _LIMITS:
        with suppress(OSError, ValueError):  # no such file; "max" for no limit
            sizes.append(int((cgroup / name).read_text()))
    return min(sizes)


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    # Linux has `ru_maxrss` begin at what the process that started this one held: a notebook, a test run.
    with suppress(OSError):
        if own := re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(own[1]) * 1024
    import resource  # Windows has none; psutil tells no peak elsewhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
