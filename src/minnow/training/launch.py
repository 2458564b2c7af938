"""Starting the processes of a run: `--nproc N` is torchrun on this machine, in one word."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from minnow.config import UserError
from minnow.host import num_cores
from minnow.training.config import TrainingConfig
from minnow.training.distribution import first_to_say, in_torchrun, only_first_speaks, process_group
from minnow.training.hardware import choose_device
from minnow.training.tracking import require_trackers

# What a SIGTERM leaves for the last checkpoint before torchrun kills; its own default is 30 seconds.
SHUTDOWN_SECONDS = 600
# A folder where the processes that `launch` starts note that they failed. After a signal its agent tells only of the
# signal, and a run that could not save must not look like one that has.
FAILURES = "MINNOW_FAILURES"
LAUNCHER = "MINNOW_LAUNCHER"  # the id of the process that runs `launch`
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_stage(work: Callable[[], None], words: Sequence[str], training: TrainingConfig) -> int:
    """Do `work` here, or in `training.nproc` processes that read the same `words`; return the exit code.

    A single one that is to be started again when it dies has a launcher too. Under torchrun this process is one of
    those: it joins the others, and only the first one prints.
    """
    require_trackers(training.track)
    if not in_torchrun():
        if training.nproc > 1 or training.restarts:
            _require_gpus(training, training.nproc, f"--nproc {training.nproc}")
            return launch(words, training.nproc, training.restarts)
        work()
        return 0
    _require_gpus(training, int(os.environ["LOCAL_RANK"]) + 1, "torchrun --nproc-per-node")
    _stop_without_launcher()
    device = choose_device(training.device)
    with only_first_speaks(), process_group(cuda=device.type == "cuda"):
        _note_failure(None)
        try:
            work()
        except (UserError, OSError) as error:
            _note_failure(2)
            if first_to_say(str(error)):
                raise
            raise SystemExit(2) from None
        except Exception:
            _note_failure(1)
            raise
    return 0


def _stop_without_launcher() -> None:
    """Ask the kernel for a SIGTERM when `launch` is killed: a run that nobody waits for saves and ends.

    Without it the processes would go on in the background, and keep the run's folder locked. Linux only.
    """
    if LAUNCHER in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(os.environ[LAUNCHER]):  # it was killed before, while this process was still importing
            os.kill(os.getpid(), signal.SIGTERM)


def _note_failure(code: int | None) -> None:
    """Leave this process's exit code for `launch`; None takes back what it noted before a restart.

    In the name of an empty file: what failed may be a full disk, and nothing here may hide the error itself.
    """
    if folder := os.environ.get(FAILURES):
        rank = os.environ["RANK"]
        with suppress(OSError):
            for note in Path(folder).glob(f"{rank}.*"):
                note.unlink()
            if code is not None:
                (Path(folder) / f"{rank}.{code}").touch()


def _require_gpus(training: TrainingConfig, processes: int, given: str) -> None:
    """UserError where `processes` on this machine would have to share its GPUs: NCCL refuses, in its own words."""
    gpus = torch.cuda.device_count() if choose_device(training.device).type == "cuda" else processes
    if processes > gpus:
        raise UserError(
            f"{given}: more processes than this machine has GPUs ({gpus}): start {gpus}, or give --training.device cpu"
        )


def launch(words: Sequence[str], processes: int, restarts: int) -> int:
    """Start `minnow WORDS` in several processes on this machine by torch's elastic agent; return their exit code.

    A process that dies takes the others with it, and all start again, from the last checkpoint, up to `restarts`
    times. A signal is passed on to them: 128 + its number comes back once they have saved, the exit code of one that
    failed where they could not.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent's own account of a failure is a page for a cluster's log; the processes have said what is wrong.
    logging.getLogger("torch.distributed").setLevel(logging.WARNING if restarts else logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    # torch 2.13's agent lends its store to the processes: those of a restart would find the dead ones' addresses in it.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
    )
    with tempfile.TemporaryDirectory(prefix="minnow-") as failures:
        os.environ |= {FAILURES: failures, LAUNCHER: str(os.getpid())}
        try:
            elastic_launch(config, sys.executable)("-m", "minnow", *words)
        except ChildFailedError as failed:
            code = failed.get_first_failure()[1].exitcode
            return 128 - code if code < 0 else code
        except SignalException as stopped:
            codes = [int(note.suffix[1:]) for note in Path(failures).iterdir()]
            # One that could not save (2) leaves the others without a connection (1).
            return max(codes, default=128 + int(stopped.sigval))
        finally:
            del os.environ[FAILURES], os.environ[LAUNCHER]
    return 0
