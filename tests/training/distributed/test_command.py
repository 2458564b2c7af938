"""`minnow STAGE --nproc 2` and torchrun, from the command line to the model folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher.api import LaunchConfig

from minnow import cli
from minnow.config import UserError
from minnow.training import launch
from minnow.training.config import TrainingConfig

from .command_line import difference, environment, losses, words, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pond, a tokenizer, and the models that one process makes of them."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    assert cli.main(words(folder, "pretrain", folder / "pretrain-1")) == 0
    assert cli.main(words(folder, "sft", folder / "sft-1")) == 0
    return folder


def start(program: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *program], env=environment(), capture_output=True, text=True, timeout=240
    )


def assert_same_run(left: Path, right: Path) -> None:
    assert losses(right) == pytest.approx(losses(left), rel=1e-5)
    assert difference(left, right) < 1e-5


def test_nproc_trains_what_one_process_trains(world: Path) -> None:
    done = start(["minnow", *words(world, "pretrain", world / "pretrain-2", nproc=2, parallel="fsdp")])
    assert done.returncode == 0, done.stderr
    assert_same_run(world / "pretrain-1", world / "pretrain-2")
    assert done.stderr.count("model written to") == 1, "only the first process speaks"
    assert (world / "pretrain-2" / "report.html").exists()


@pytest.mark.slow
def test_torchrun_trains_what_one_process_trains_with_uneven_masks(world: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "minnow"]
    done = start([*torchrun, *words(world, "sft", world / "sft-2", parallel="ddp")])
    assert done.returncode == 0, done.stderr
    assert_same_run(world / "sft-1", world / "sft-2")


def test_a_mistake_is_told_once_and_keeps_its_exit_code(world: Path) -> None:
    (world / "empty.jsonl").write_text("")
    settings = {"nproc": 2, "data.paths": world / "empty.jsonl"}
    done = start(["minnow", *words(world, "pretrain", world / "never", **settings)])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "empty.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (world / "never").exists()


@pytest.mark.parametrize(("failures", "code"), [([], 143), ([2], 2), ([1, None], 143)])
def test_a_failure_after_a_signal_is_no_saved_stop(
    monkeypatch: pytest.MonkeyPatch, failures: list[int | None], code: int
) -> None:
    """torch's agent tells only of the signal. None: the process was started again."""

    def elastic_launch(config: LaunchConfig, program: str) -> Callable[..., None]:
        def start(*words: str) -> None:
            for failure in failures:
                launch._note_failure(failure)
            raise SignalException("stopped", signal.SIGTERM)

        return start

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # launch sets it where it is missing
    assert launch.launch(["pretrain"], 2, 0) == code
    assert not {launch.FAILURES, launch.LAUNCHER} & set(os.environ)


def test_the_processes_share_the_cores_also_where_nobody_tells_which_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac, where os has no sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that it is put back afterwards
    monkeypatch.delenv("OMP_NUM_THREADS")
    seen: list[str] = []

    def elastic_launch(config: LaunchConfig, program: str) -> Callable[..., None]:
        return lambda *words: seen.append(os.environ["OMP_NUM_THREADS"])

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    assert launch.launch(["pretrain"], 4, 0) == 0
    assert seen == ["3"]


@pytest.mark.parametrize("failures", [[(0, 2), (1, 1)], [(1, 1), (0, 2)], [(0, 1), (1, 2)]])
def test_after_a_signal_what_a_user_can_mend_counts(
    monkeypatch: pytest.MonkeyPatch, failures: list[tuple[int, int]]
) -> None:
    """One process cannot save (2), and its neighbour has lost the connection to it (1): whichever note is read first.

    On a full disk, where an empty file is all that can be written.
    """

    def elastic_launch(config: LaunchConfig, program: str) -> Callable[..., None]:
        def start(*words: str) -> None:
            for rank, code in failures:
                monkeypatch.setenv("RANK", str(rank))
                launch._note_failure(code)
            raise SignalException("stopped", signal.SIGTERM)

        return start

    def full(*content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch.launch(["pretrain"], 2, 0) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_a_process_whose_launcher_was_killed_while_it_was_importing_ends() -> None:
    """The kernel tells of no death that came before it was asked to."""
    script = """
import os
from minnow.training.launch import LAUNCHER, _stop_without_launcher
for launcher in (os.getppid(), os.getpid()):
    os.environ[LAUNCHER] = str(launcher)
    _stop_without_launcher()
    print("goes on", flush=True)
"""
    program = [sys.executable, "-c", script]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "goes on\n"), done.stderr


def test_a_note_that_cannot_be_left_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(launch.FAILURES, str(tmp_path / "gone"))
    launch._note_failure(2)


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_before_the_run_folder_is_made(world: Path) -> None:
    settings = {"nproc": 2, "batch_tokens": 192, "micro_batch_tokens": 64}
    done = start(["minnow", *words(world, "pretrain", world / "never", **settings)])
    assert done.returncode == 2, done.stderr
    assert "3 rows a batch, 1 at a time, cannot be shared evenly by 2 processes" in done.stderr
    assert not (world / "never").exists()


def test_one_process_too_is_started_again_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `restarts` was left unread."""
    monkeypatch.setattr(launch, "launch", lambda words, processes, restarts: 10 * processes + restarts)
    assert launch.run_stage(lambda: None, ["pretrain"], TrainingConfig(steps=1, device="cpu", restarts=3)) == 13
    assert launch.run_stage(lambda: None, ["pretrain"], TrainingConfig(steps=1, device="cpu")) == 0


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL said "Duplicate GPU detected", or CUDA "invalid device ordinal", from every process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "launch", lambda words, processes, restarts: processes)
    with pytest.raises(UserError, match=r"--nproc 4: more processes than this machine has GPUs \(2\): start 2"):
        launch.run_stage(lambda: None, ["pretrain"], TrainingConfig(steps=1, nproc=4))
    assert launch.run_stage(lambda: None, ["pretrain"], TrainingConfig(steps=1, nproc=2)) == 2
    assert launch.run_stage(lambda: None, ["pretrain"], TrainingConfig(steps=1, nproc=4, device="cpu")) == 4
    monkeypatch.setattr(launch, "in_torchrun", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="torchrun --nproc-per-node: more processes than"):
        launch.run_stage(lambda: None, ["pretrain"], TrainingConfig(steps=1))
