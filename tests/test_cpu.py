"""Which CPUs compute in bf16 by default, and whose OpenMP threads stay."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minnow.config import UserError
from minnow.cpu import cpu_multiplies_bf16_faster, in_passing_thread, keep_freed_memory
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.optim.newton_schulz import fast_dtype
from minnow.training import session
from minnow.training.config import TrainingConfig
from minnow.training.hardware import choose_precision


@pytest.mark.parametrize(
    ("capabilities", "faster"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),  # a host that hides AMX
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({}, False),
    ],
)
def test_bf16_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], faster: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)  # not in 2.10
    assert cpu_multiplies_bf16_faster() is faster
    expected = torch.bfloat16 if faster else torch.float32
    assert choose_precision("auto", torch.device("cpu")) == expected
    assert fast_dtype(torch.zeros(2, 2)) == expected


@pytest.mark.parametrize("amx", [True, False])
def test_an_older_torch_tells_of_amx_only(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert cpu_multiplies_bf16_faster() is amx


def test_what_is_done_in_passing_comes_back() -> None:
    assert in_passing_thread(lambda: threading.current_thread()) not in threading.enumerate()

    def fail() -> None:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        in_passing_thread(fail)


def test_what_failed_in_passing_leaves_nothing_behind() -> None:
    """A server that could not reload a model would hold it until Python looks for cycles."""
    loaded: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        weights = torch.ones(3)
        loaded.append(weakref.ref(weights))
        raise UserError("other shape")

    gc.disable()
    try:
        with pytest.raises(UserError):
            in_passing_thread(fail)
        assert loaded[0]() is None
    finally:
        gc.enable()


def test_ctrl_c_ends_what_is_done_in_passing() -> None:
    """Python ended beside the thread that computed: "terminate called without an active exception", exit code 134."""
    program = """
import sys, time, torch
from minnow.cpu import in_passing_thread, keep_freed_memory
def compute():
    x = torch.randn(300, 300)
    print("begun", flush=True)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        x = (x @ x).clamp(-1, 1)
try:
    in_passing_thread(compute)
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=50)
    assert process.returncode == 130, said
    assert not said


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_a_passing_thread_leaves_no_threads_of_openmp() -> None:
    """Those of the main thread stay, and would put the next thread's to sleep between its operations."""
    program = """
import os, time, torch
from minnow.cpu import in_passing_thread, keep_freed_memory
def threads():
    return len(os.listdir("/proc/self/task")) - before
def compute():
    torch.ones(1 << 20).exp().sum()
    return threads()
before = len(os.listdir("/proc/self/task"))
inside = in_passing_thread(compute)
deadline = time.monotonic() + 30
while threads() and time.monotonic() < deadline:  # they end a moment after the one that they helped
    time.sleep(0.01)
print(torch.get_num_threads(), inside, threads(), compute())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    threads, inside, after, in_main = map(int, done.stdout.split())
    if threads == 1:
        pytest.skip("one core: nobody helps")
    assert inside > 1, "itself and its helpers"
    assert in_main > 0, "helpers stay with a thread that lives"
    assert after == 0


FAULTS = """
import resource, torch
from minnow.cpu import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(2**22) for _ in range(8)]  # 16 MB each
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_not_mapped_again() -> None:
    """128 MB taken and left ten times: 327,680 pages of 4 KB, which by default are nearly always all mapped anew."""
    assert faults() < 100


def test_training_on_a_cpu_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(session, "keep_freed_memory", lambda: asked.append("kept"))
    model = CausalLM(ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1))
    session.Machine(torch.device("cpu"), torch.float32).place(model, TrainingConfig(compile="off"), 0.0, print)
    assert asked == ["kept"]


def test_settings_of_malloc_in_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *values: asked.append(values)))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    for name, value in (("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            keep_freed_memory()
    assert asked == []
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.nns=5")
    keep_freed_memory()
    assert asked == [(-1, -1), (-3, 32 * 2**20)]


def faults() -> int:
    """Pages mapped by a process of its own, whose environment sets nothing of malloc."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True, env=rest)
    return int(ran.stdout)
