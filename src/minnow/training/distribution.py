"""The processes of a run: who I am among them, and the few things they must agree on.

`torchrun` (or `--nproc`) starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE. Every function here also
works in a run of one process, where nothing is sent: the code around it has no second path.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minnow.disk import atomic_write

T = TypeVar("T")

# Preparing data may take hours, and only the first process does it: waiting for it must not time out.
_PATIENCE = timedelta(days=7)
_groups: dict[str, dist.ProcessGroup] = {}


def in_torchrun() -> bool:
    """Whether this process was started as one of several (or as the only one) by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes of the run, on all hosts."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Processes of the run on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_first() -> bool:
    """Whether this process prints, logs and writes what is written once."""
    return rank() == 0


def started_again(mark: Path) -> bool:
    """Whether torchrun has started this command once more since `mark_start(mark)`, on processes or hosts that were
    lost.

    What the command says about the beginning (--overwrite, which checkpoint to resume from) was for its first start.
    All ask together. A host that comes in the place of a lost one has a torchrun of its own, and where the others only
    made room for it no restart is counted: it is enough that one torchrun is left of those that have begun.
    """
    agents = _agents()
    began = from_first(mark.read_text(encoding="utf-8").split("\n") if is_first() and mark.exists() else [])
    again = not set(agents).isdisjoint(began)
    if again and is_first():
        _write_agents(mark, agents)  # the newcomers have begun too, and the old ones may be lost next
    return again


def mark_start(mark: Path) -> None:
    """Note in the file `mark` that this launch has made its beginning. All call it."""
    agents = _agents()
    if is_first():
        _write_agents(mark, agents)


def _agents() -> list[str]:
    """The torchrun of each process: its host and its folder of logs there, RUN_LOGS/attempt_0/0/error.json's.

    torchrun draws a new name for that folder whenever it is started, and keeps it when it starts processes again.
    """
    if not in_torchrun():
        return []
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # empty with --log-dir /dev/null
    return sorted(set(gather(f"{socket.gethostname()} {Path(file).parents[2] if file else os.getppid()}")))


def _write_agents(mark: Path, agents: Sequence[str]) -> None:
    with atomic_write(mark) as temporary:
        temporary.write_text("\n".join(agents), encoding="utf-8")


@contextmanager
def process_group(*, cuda: bool) -> Iterator[None]:
    """Join the other processes for the length of the block, if torchrun started this one.

    Gradients go over NCCL on CUDA; what is agreed on between host programs goes over gloo, so that no GPU waits.
    """
    if not in_torchrun():
        yield
        return
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    for name in ("host", "checkpoint"):  # checkpoints are written by a thread, which must not meet the loop's messages
        _groups[name] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield
        dist.barrier(_groups["host"])  # nobody leaves while another still needs the first one's store
    finally:
        _groups.clear()
        dist.destroy_process_group()


def host_group() -> dist.ProcessGroup | None:
    """The processes as a gloo group that waits as long as it takes; None in a run of one."""
    return _groups.get("host")


def checkpoint_group() -> dist.ProcessGroup | None:
    """The same processes as another group, for the thread that writes checkpoints."""
    return _groups.get("checkpoint")


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Add up each of `values` over all processes, in float64 on the host."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def largest_over_ranks(value: float) -> float:
    """Return the greatest `value` of all processes."""
    if world_size() == 1:
        return value
    greatest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return greatest.item()


def from_first(value: T) -> T:
    """Return the first process's `value` (anything that pickles; it comes from our own processes only)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_groups["host"])
    return box[0]


def gather(value: T) -> list[T]:
    """Return the `value` of every process, in the order of their ranks, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_groups["host"])
    return values


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Run the block on the first process alone, then on the others: they find what it has left on disk.

    When the first one fails, the others leave with the same exit code, without a word.
    """
    if world_size() == 1:
        yield
        return
    if not is_first():
        code = from_first(0)
        if code:
            raise SystemExit(code)
        yield
        return
    try:
        yield
    except SystemExit as error:
        from_first(error.code or 1)
        raise
    except BaseException:
        from_first(2)
        raise
    from_first(0)


@contextmanager
def only_first_speaks() -> Iterator[None]:
    """Silence stdout and stderr of all processes but the first."""
    if int(os.environ.get("RANK", "0")) == 0:
        yield
        return
    spoken = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = spoken


def first_to_say(text: str) -> bool:
    """Whether no other process has said `text` yet: an error that all of them meet is told once."""
    if world_size() == 1:
        return True
    store = dist.distributed_c10d._get_default_store()
    said = int(store.add(f"minnow said {hashlib.sha256(text.encode()).hexdigest()}", 1))
    return said == 1
