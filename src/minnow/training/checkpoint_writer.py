"""Writing checkpoints beside the training: a step waits for a copy in memory, not for the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.optim import Optimizer

from minnow.config import UserError
from minnow.disk import DiskFull, atomic_write, is_full
from minnow.training.checkpoint import (
    COMPLETE,
    SOURCE,
    STATE,
    Checkpoint,
    delete_checkpoint,
    describe_files,
    list_checkpoints,
    prune_checkpoints,
    random_state,
    tensors_to_save,
)
from minnow.training.distribution import (
    checkpoint_group,
    first_goes_first,
    from_first,
    gather,
    is_first,
    rank,
    world_size,
)


class CheckpointWriter:
    """One checkpoint at a time: `save` waits for the one before, copies, and returns while a thread writes."""

    def __init__(self, folder: Path, *, keep_last: int) -> None:
        self.folder, self.keep_last = folder, keep_last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        state: dict[str, Any],
        *,
        source: dict[str, Any] | None,
        best_step: int | None,
    ) -> Checkpoint:
        """Begin to write `step-XXXXXXXX`. `state` must be plain JSON; `source` may hold tensors.

        All processes call it at the same step. UserError when the checkpoint before could not be written.
        """
        self.wait()
        folder = self.folder / f"step-{step:08d}"
        rng = gather(random_state())
        with told_in_words(folder):
            with first_goes_first():  # torch makes the folder on every process: before this it would be in the way
                if is_first():
                    self._begin(folder, {**state, "step": step, "rng": rng}, source)
            # torch copies the tensors before it returns, and a thread writes the copies.
            written = dcp.async_save(
                tensors_to_save(model, optimizers),
                storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                process_group=checkpoint_group(),
                no_dist=world_size() == 1,
            )
        assert isinstance(written, Future)
        self._pending = self._thread.submit(self._commit, folder, written, best_step)
        return Checkpoint(folder, step)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete. UserError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, once none is being written."""
        self.wait()
        found = list_checkpoints(self.folder)
        return from_first(found[-1].step if found else None)

    def prune(self, best_step: int | None) -> None:
        """Delete what is neither among the last ones nor the best, once none is being written."""
        self.wait()
        if is_first():
            prune_checkpoints(self.folder, keep_last=self.keep_last, best_step=best_step)

    def _begin(self, folder: Path, state: dict[str, Any], source: dict[str, Any] | None) -> None:
        if folder.exists():  # left half-written by a run that was killed
            delete_checkpoint(folder)
        folder.mkdir(parents=True)
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        if source is not None:
            torch.save(source, folder / SOURCE)
        config = self.folder.parent / "config.yaml"
        if config.exists():
            shutil.copy(config, folder)

    def _commit(self, folder: Path, written: Future[Any], best_step: int | None) -> None:
        """Once every process has written its shard: checksums, the mark of completeness, and room for the next."""
        with told_in_words(folder):
            written.result()
            mine = list(folder.glob(f"shard-{rank() + 1:05d}-*"))
            if is_first():
                mine += [path for path in folder.iterdir() if not path.name.startswith("shard-")]
            files = _gather_files(describe_files(mine))
            if is_first():
                with atomic_write(folder / COMPLETE) as temporary:
                    temporary.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
                prune_checkpoints(self.folder, keep_last=self.keep_last, best_step=best_step)


def _gather_files(mine: dict[str, Any]) -> dict[str, Any]:
    if world_size() == 1:
        return mine
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine, group=checkpoint_group())
    return {name: entry for files in everyone for name, entry in files.items()}


class told_in_words:  # noqa: N801 - used like a function
    """Turn a full disk, and whatever else keeps a checkpoint from being written, into a UserError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or not (isinstance(error, OSError | CheckpointException | DiskFull) or is_full(error)):
            return
        causes = list(_causes(error))
        of_system = [cause for cause in causes if isinstance(cause, OSError)]
        why = "the disk is full" if any(map(is_full, causes)) else str(of_system[0] if of_system else error)
        before = [c for c in list_checkpoints(self.folder.parent) if c.folder != self.folder]
        kept = f"{before[-1].folder.name} before it is whole" if before else "there is none before it"
        raise UserError(
            f"{self.folder}: the checkpoint could not be written ({why}); {kept}. Make room, and run the same command "
            "again to continue"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            yield from _causes(failure)
    for cause in (error.__cause__, error.__context__):
        if cause is not None:
            yield from _causes(cause)
