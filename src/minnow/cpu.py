"""What this processor is good at, and how to leave it to those who compute."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from threading import Event, Thread
from typing import TypeVar

import torch

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER_TRIM, _LARGEST_MMAP_THRESHOLD = -1, 32 * 2**20


def in_passing_thread(work: Callable[[], T]) -> T:
    """Do `work` in a thread of its own, wait for it, and give back what it returns or raises.

    For work with tensors before another thread computes for long. On a CPU every thread that has computed keeps its
    own OpenMP threads until it ends; when there are more of them than cores, GNU's OpenMP lets all of them sleep
    between two operations instead of waiting awake, and a small model's step takes two to three times as long.

    Ctrl-C interrupts the work, and is waited for: Python aborts when it ends beside a thread that computes.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = Event()  # a join that Ctrl-C has interrupted takes the thread for ended, up to Python 3.12

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = Thread(target=run, name="minnow-passing", daemon=True)  # a second Ctrl-C does not wait
    thread.start()
    try:
        done.wait()
    except KeyboardInterrupt:  # the main thread alone gets it
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
        )
        done.wait()
        thread.join()
        raise
    thread.join()
    if errors:
        raise errors.pop()  # and not kept here: its traceback holds this frame, and what the work had loaded
    return results.pop()


def keep_freed_memory() -> None:
    """Have the C library keep the memory of tensors up to 32 MB when they are freed, until the process ends.

    By default it gives most of it back to the system, and a training step, which takes and frees the same gigabytes as
    the one before, has the system clear and map each page again. That was measured at between nothing and 13% of a
    small model's step (docs/experiments.md), and the most memory in use at the same but for a few percent. glibc only;
    elsewhere, and where the environment sets glibc's malloc otherwise, nothing happens.
    """
    set_otherwise = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or set_otherwise or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


def cpu_multiplies_bf16_faster() -> bool:
    """Whether the CPU multiplies matrices faster in bf16 than in float32.

    With AMX it does, about ten times. Having AVX-512's bf16 instructions is not enough: an Intel Xeon whose host hides
    its AMX was measured at half the speed of its float32 products. AMD's are given the benefit of the doubt.
    A table and no timing, so that a resumed run, or another process of the same one, decides the same.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch tells less
        return bool(torch.cpu._is_amx_tile_supported())
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16", False):
        return True
    return bool(capabilities.get("avx512_bf16", False)) and "intel" not in str(capabilities.get("cpu_name")).lower()
