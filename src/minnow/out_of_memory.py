"""Out of memory: one message that says what was being done, how much memory is in use, and what to change."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from minnow.config import UserError
from minnow.host import host_memory, peak_memory

_GIB = 2**30
# What torch says where it raises no exception of its own kind: a CPU's allocator (Linux, then Windows and macOS),
# Apple's GPUs, cuBLAS without room for its workspace.
_SIGNS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class OutOfMemory(UserError):  # noqa: N818 (torch and Python have taken the other name)
    """Memory did not suffice; the message proposes settings with which it may."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, on the host or on a GPU, did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def explained(error: BaseException, doing: str, proposals: Sequence[str]) -> OutOfMemory:
    """Return `error`, for which `is_out_of_memory` holds, as a message to a person.

    doing: what the memory was for, after "while". Notes on the error (PEP 678) say more about it. proposals: settings
    to change, likeliest first.
    """
    where = "; ".join([doing, *getattr(error, "__notes__", [])])
    lines = [f"out of memory while {where}: {_amounts(error)}"]
    if proposals:
        lines.append("what helps, one after the other:")
    return OutOfMemory("\n".join([*lines, *(f"  {proposal}" for proposal in proposals)]))


def _amounts(error: BaseException) -> str:
    """How much was asked for, is held and is there."""
    text = str(error)
    asked = re.search(r"(?:tried to allocate|Tried to allocate) ([\d.]+) (bytes|KiB|MiB|GiB)", text)
    parts = [] if asked is None else [f"{_gib(float(asked[1]) * _UNITS[asked[2]])} more were asked for"]
    if torch.cuda.is_available() and (isinstance(error, torch.OutOfMemoryError) or "CUDA" in text or "CUBLAS" in text):
        free, total = torch.cuda.mem_get_info()
        ours, others = torch.cuda.max_memory_allocated(), total - free - torch.cuda.memory_reserved()
        parts.append(f"this process held up to {_gib(ours)} of the {_gib(total)} of {torch.cuda.get_device_name()}")
        if others > _GIB:
            parts.append(f"{_gib(others)} are taken by other programs or by torch itself")
    else:
        parts.append(f"this process held up to {_gib(peak_memory())} of this machine's {_gib(host_memory())}")
    return ", ".join(parts)


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.1f} MiB"
