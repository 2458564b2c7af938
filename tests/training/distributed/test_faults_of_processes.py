"""A process of a run dies, a run is told to stop, a host is lost: all go on from the last checkpoint to the same end.

Which steps are repeated depends on the moment; the final weights do not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from minnow import cli
from minnow.training.checkpoint import list_checkpoints

from .command_line import difference, environment, losses, words, write_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Steps long enough to be interrupted between the first checkpoint and the last step: 32 micro-batches each. A larger
# eps, as in the matrix: AdamW must not lift the rounding of a sum over processes to visible size.
LONG = {"steps": 20, "batch_tokens": 4096, "save_every": 4, "optim.eps": 1e-6}
LAST = 20
SILENCE = 20  # seconds that hosts wait for each other: more than a step takes

Start = Callable[[list[str], Path], subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a tokenizer, and the run of one process that nothing happened to."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    assert cli.main(words(folder, "pretrain", folder / "straight", **LONG)) == 0
    return folder


@pytest.fixture
def start() -> Iterator[Start]:
    """What starts a program that writes into a log; whatever still runs after the test is stopped."""
    started: list[subprocess.Popen[bytes]] = []

    def start_program(program: list[str], log: Path) -> subprocess.Popen[bytes]:
        with open(log, "ab") as file:
            started.append(subprocess.Popen(program, env=environment(), stdout=file, stderr=subprocess.STDOUT))
        return started[-1]

    yield start_program
    for process in started:
        process.terminate()
        process.wait(timeout=60)


def wait_until(happened: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def saved(run: Path) -> bool:
    return bool(list_checkpoints(run / "checkpoints"))


def workers(launcher: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]


def runs(pid: int) -> bool:
    """Whether the process is there, and not just waits to be waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_same_end(world: Path, run: Path) -> None:
    assert losses(run) == pytest.approx(losses(world / "straight"), rel=1e-5)
    assert difference(world / "straight", run) < 1e-5


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_dies_is_started_again_from_the_last_checkpoint(
    world: Path, start: Start, processes: int
) -> None:
    """`--overwrite` is for the first start: the second one deleted the run that it was to continue."""
    run, log = world / f"restarted-{processes}", world / f"restarted-{processes}.log"
    settings = LONG | {"nproc": processes, "restarts": 1, "parallel": "fsdp", "overwrite": "true"}
    process = start([sys.executable, "-m", "minnow", *words(world, "pretrain", run, **settings)], log)
    wait_until(lambda: saved(run), process, log)
    os.kill(workers(process)[-1], signal.SIGKILL)
    assert process.wait(timeout=240) == 0, log.read_text()
    assert f"continuing {run} from step" in log.read_text()
    assert_same_end(world, run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_stops_all_after_the_same_step(
    world: Path, start: Start, number: int, code: int
) -> None:
    run, log = world / f"stopped-{code}", world / f"stopped-{code}.log"
    command = [sys.executable, "-m", "minnow", *words(world, "pretrain", run, **LONG, nproc=2)]
    process = start(command, log)
    wait_until(lambda: saved(run), process, log)
    process.send_signal(number)
    assert process.wait(timeout=240) == code, log.read_text()
    assert log.read_text().count("stopped at step") == 1
    stopped = list_checkpoints(run / "checkpoints")[-1].step
    assert f"stopped at step {stopped};" in log.read_text()
    assert stopped < LAST
    assert start(command, log).wait(timeout=240) == 0, log.read_text()
    assert f"continuing {run} from step {stopped}" in log.read_text()
    assert_same_end(world, run)


def test_a_killed_launcher_leaves_no_process_behind(world: Path, start: Start) -> None:
    """They went on in the background, and kept the run locked to whoever started it again."""
    run, log = world / "orphaned", world / "orphaned.log"
    command = [sys.executable, "-m", "minnow", *words(world, "pretrain", run, **LONG, nproc=2)]
    process = start(command, log)
    wait_until(lambda: saved(run), process, log)
    left = workers(process)
    assert len(left) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 240
    while any(runs(pid) for pid in left):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    stopped = list_checkpoints(run / "checkpoints")[-1].step
    assert stopped < LAST
    assert f"stopped at step {stopped};" in log.read_text()
    assert start(command, log).wait(timeout=240) == 0, log.read_text()
    assert f"continuing {run} from step {stopped}" in log.read_text()
    assert_same_end(world, run)


def test_a_signal_to_a_run_that_cannot_save_is_a_failure(world: Path, start: Start) -> None:
    run, log = world / "unsaved", world / "unsaved.log"
    process = start([sys.executable, "-m", "minnow", *words(world, "pretrain", run, **LONG, nproc=2)], log)
    wait_until(lambda: saved(run), process, log)
    (run / "checkpoints").rename(run / "moved")
    (run / "checkpoints").write_text("no folder")
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=240)
    assert code in (1, 2), log.read_text()
    assert "checkpoints" in log.read_text()


class Host:
    """A network namespace with one end of a cable, the other in its neighbour."""

    def __init__(self, number: int) -> None:
        self.name = f"minnow-{os.getpid()}-{number}"
        self.cable = f"mw{os.getpid()}n{number}"  # 15 characters at most
        self.address = f"10.213.7.{number}"

    def torchrun(self, world: Path, run: Path, *, rendezvous: Host) -> list[str]:
        """The command that starts a process on this host, of a job of two hosts."""
        torchrun = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{rendezvous.address}:29400", "--rdzv-id", "two"]
        torchrun += [
            "--rdzv-conf",
            f"is_host={int(self is rendezvous)}",
            "--local-addr",
            self.address,
            "-m",
            "--",
            "minnow",
        ]
        settings = [f"GLOO_SOCKET_IFNAME={self.cable}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]  # see docs/scaling.md
        command = ["env", *settings, sys.executable, "-m", *torchrun]
        return ["ip", "netns", "exec", self.name, *command, *words(world, "pretrain", run, **LONG, ddp_timeout=SILENCE)]

    def set_cable(self, state: Literal["up", "down"]) -> None:
        ip("-n", self.name, "link", "set", self.cable, state)

    def lose_power(self) -> None:
        """SIGKILL for every process in the namespace."""
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    hosts = Host(1), Host(2)
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        ip("link", "add", hosts[0].cable, "type", "veth", "peer", "name", hosts[1].cable)
        for host in hosts:
            ip("link", "set", host.cable, "netns", host.name)
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.cable)
            ip("-n", host.name, "link", "set", "lo", "up")
            host.set_cable("up")
        yield hosts
    finally:
        for host in hosts:
            if host.name in ip("netns", "list"):
                host.lose_power()
                ip("netns", "delete", host.name)


def cannot_make_hosts() -> str | None:
    try:
        with two_hosts():
            return None
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {error}"


@pytest.mark.parametrize("fault", ["power", "cable"])
def test_a_host_is_lost_and_comes_back(fault: str, world: Path, start: Start) -> None:
    """Without power its connections are closed; behind a cut cable each host only hears nothing of the other any
    more."""
    if (why := cannot_make_hosts()) is not None:
        pytest.skip(why)
    run = world / fault
    with two_hosts() as (first, second):
        logs = world / f"{fault}-1.log", world / f"{fault}-2.log"
        commands = [host.torchrun(world, run, rendezvous=first) for host in (first, second)]
        nodes = [start(command, log) for command, log in zip(commands, logs, strict=True)]
        wait_until(lambda: saved(run), nodes[0], logs[0])
        stayed = workers(nodes[0])
        if fault == "power":
            second.lose_power()
            nodes[1].wait(timeout=60)
            nodes[1] = start(commands[1], logs[1])
        else:
            second.set_cable("down")
        wait_until(lambda: not any(runs(pid) for pid in stayed), nodes[0], logs[0])
        assert list_checkpoints(run / "checkpoints")[-1].step < LAST, "the run was over before the host was lost"
        second.set_cable("up")
        codes = [node.wait(timeout=400) for node in nodes]
    said = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], said
    assert f"continuing {run} from step" in said
    assert_same_end(world, run)
