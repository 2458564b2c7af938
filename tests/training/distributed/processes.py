"""Several gloo processes for a test, started as torchrun starts them, without its seconds of rendezvous."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from functools import cache
from pathlib import Path

from tests.training.distributed.imported import Forked, Imported, Program

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment(rank: int, world_size: int, local_world_size: int, port: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local_world_size),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
    }


@cache
def imported(parity: int) -> Imported:
    """One of two: what is forked of one process hashes text alike, so that its sets have one order; ranks do not."""
    return Imported()


def run_processes(
    module: str, *arguments: str, world_size: int, local_world_size: int | None = None, timeout: float = 240
) -> list[str]:
    """Run `python -m MODULE ARGUMENTS` in `world_size` processes; return what each has said. All must succeed."""
    port = free_port()
    files = [tempfile.NamedTemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115 - closed below
    started: list[Forked] = []
    failed = False
    try:
        for rank, file in enumerate(files):
            variables = environment(rank, world_size, local_world_size or world_size, port)
            started.append(imported(rank % 2).start(Program(module, arguments, variables, Path(file.name))))
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in started):
            failed = any(process.returncode for process in started)  # the others would wait for it
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        time.sleep(0.5 if failed else 0.0)
    finally:  # also where Ctrl-C or the test's own time limit ends it
        for process in started:
            process.kill()
        codes = [process.wait() for process in started]
    said = []
    for file in files:
        file.seek(0)
        said.append(file.read())
        file.close()
    assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n---\n".join(said)
    return said
