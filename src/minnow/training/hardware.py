"""What the machine can do: the device, the number format that is fast on it, its measured matmul peak, its memory."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from functools import cache
from typing import Literal

import torch

from minnow.config import UserError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: DeviceName) -> torch.device:
    """Return the device called `name`; `auto` takes CUDA, else MPS, else the CPU. UserError if it is not there.

    On CUDA it is the current one: each process under torchrun has chosen its own before.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    if not available[name]:
        raise UserError(f"--device {name}: this machine (or this build of torch) has none; use --device auto")
    return torch.device(name)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware: elsewhere they are emulated, several times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def choose_precision(name: Precision, device: torch.device) -> torch.dtype:
    """Return the compute dtype; `auto` is bf16 where the hardware has it, else fp32."""
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    return DTYPES[name]


def has_cpp_compiler() -> bool:
    """Whether torch.compile can build CPU kernels here."""
    return any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++"))


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next measures finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the machine's matrix-product peak in FLOP/s: the fastest of seven products of square matrices.

    Model FLOP utilisation is given against this figure, not against a vendor's table, so that it means the same
    on a laptop and on a shared server.
    """
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: on the CUDA device, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
