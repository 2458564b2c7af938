"""What the machine can do: the device, the number format that is fast on it, its measured matmul peak, its memory."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from minnow.config import UserError
from minnow.cpu import cpu_multiplies_bf16_faster
from minnow.host import peak_memory
from minnow.model.cpp import cpp_compiler

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


CPU_PROBE_SECONDS = 1.0
LONG_PRODUCT = 0.05
LARGEST_CPU_PRODUCT = 4096
"""Of `matmul_peak` on a CPU: the time after which it stops, a product long enough to be told exactly, and the size of
the largest."""


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
    """Whether bf16 matrix products run in hardware and are faster than fp32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return cpu_multiplies_bf16_faster()
    return False


def choose_precision(name: Precision, device: torch.device) -> torch.dtype:
    """Return the compute dtype; `auto` is bf16 where the hardware multiplies faster in it, else fp32.

    On CUDA it also says, here and nowhere else, whether this process may multiply float32 as TF32 (10 bits of fraction
    instead of 23): with `tf32` only. Sums and everything between the products stay float32. UserError where the
    hardware has no TF32.
    """
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    if name == "tf32" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise UserError("--precision tf32: only NVIDIA GPUs from Ampere on have it; use fp32")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    return DTYPES[name]


def precision_name(dtype: torch.dtype) -> Precision:
    """What `choose_precision` was last told, given what it answered."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "high":
        return "tf32"
    return next(name for name, of_name in DTYPES.items() if of_name == dtype)


def device_name(device: torch.device) -> str:
    """Return what the device is, for a person: "cpu", or "cuda (NVIDIA H200, 150 GB)"."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"cuda ({properties.name}, {properties.total_memory / 1e9:.0f} GB)"


def has_cpp_compiler() -> bool:
    """Whether torch.compile can build CPU kernels here."""
    return cpp_compiler() is not None


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next measures finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the machine's matrix-product peak in FLOP/s: the fastest of some trials with square random matrices.

    Model FLOP utilisation is given against this figure, not against a vendor's table, so that it means the same
    on a laptop and on a shared server. Random, because a GPU that multiplies zeros draws less power and runs faster.
    """
    return _matmul_peak(torch.device(device.type), dtype, torch.get_float32_matmul_precision())


@cache
def _matmul_peak(device: torch.device, dtype: torch.dtype, fp32_products: str) -> float:
    if device.type == "cpu":
        return _cpu_matmul_peak(dtype)
    cuda = device.type == "cuda"
    size, in_a_row = (8192, 8) if cuda else (2048, 1)  # a launch and a wait are 2% of one product on a large GPU
    a = _random_square(size, device, dtype)
    out = torch.empty_like(a)
    seconds = []
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            torch.mm(a, a, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    if cuda:
        del a, out
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 * in_a_row / min(seconds)


def _random_square(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """From a generator of its own: a resumed run's dropout goes on in the one that this would have drawn from."""
    return torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)


def _cpu_matmul_peak(dtype: torch.dtype) -> float:
    """The fastest of products that grow until one takes `LONG_PRODUCT` seconds, then of up to seven of that size.

    A CPU that emulates the number format is a thousand times slower than one that has it: a fixed size would take
    minutes on the one, or tell nothing of the other.
    """
    begin = time.perf_counter()
    size, peak, trials = 256, 0.0, 0
    a = _random_square(size, torch.device("cpu"), dtype)
    while trials < 7:
        start = time.perf_counter()
        torch.mm(a, a)
        end = time.perf_counter()
        peak = max(peak, 2 * size**3 / (end - start))
        if end - begin > CPU_PROBE_SECONDS:
            break
        if end - start < LONG_PRODUCT and size < LARGEST_CPU_PRODUCT:
            size *= 2
            a = _random_square(size, torch.device("cpu"), dtype)
        else:
            trials += 1
    return peak


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: on the CUDA device, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
