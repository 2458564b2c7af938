# ruff: noqa: N815 (fields carry their shape)
"""The objective of distillation on packed rows, and the store of what a teacher said about them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from minnow.data.batches import Batch, PackedRows
from minnow.disk import new_folder_beside, told_when_full
from minnow.model.transformer import CausalLM
from minnow.objectives.distillation import (
    CHUNK_SIZE,
    DistillationLossConfig,
    TeacherChunk,
    linear_distillation,
    top_k_outcomes,
)
from minnow.training.forward import hidden_states
from minnow.training.objective import ObjectiveOutput
from minnow.training.reference import weights_fingerprint


@dataclass(frozen=True)
class TaughtBatch(Batch):
    """Rows with the teacher's most likely next tokens."""

    teacher_ids_BTK: Tensor
    """int32 [B, T, k]."""
    teacher_logprobs_BTK: Tensor
    """float16 [B, T, k + 1]: their log-probabilities at the run's temperature and, last, that of all others."""


@dataclass(frozen=True)
class TaughtRows:
    """Packed rows with what `teacher_store` kept about them."""

    dataset: PackedRows
    ids_RTK: np.ndarray
    logprobs_RTK: np.ndarray

    @property
    def window_rows(self) -> Iterator[int]:
        """Rows of each window."""
        return self.dataset.window_rows

    def batch(self, row_indices: Sequence[int] | np.ndarray) -> TaughtBatch:
        """Read rows, in the order given."""
        rows = np.asarray(row_indices, dtype=np.int64)
        return TaughtBatch(
            **vars(self.dataset.batch(rows)),
            teacher_ids_BTK=torch.from_numpy(self.ids_RTK[rows].astype(np.int32)),
            teacher_logprobs_BTK=torch.from_numpy(self.logprobs_RTK[rows]),
        )


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy and divergence from a teacher over the weighted targets."""

    loss: DistillationLossConfig
    teacher: CausalLM | None
    """On the student's device; None where the batches bring what it said."""
    vocab_size: int
    """Tokens of the tokenizer that both share."""

    def count(self, batch: Batch) -> float:
        """Sum of the targets' weights."""
        return float(batch.weights_BT.sum())

    def __call__(self, model: CausalLM, batch: Batch) -> ObjectiveOutput:
        """Return the weighted loss of one packed micro-batch, and its two parts."""
        supervised_BT = batch.weights_BT > 0
        hidden_BTD = hidden_states(model, batch)
        found = linear_distillation(
            self.loss,
            hidden_BTD[supervised_BT],
            model.head_weight,
            batch.targets_BT[supervised_BT],
            batch.weights_BT[supervised_BT],
            self._teacher_of(batch, supervised_BT),
            vocab_size=self.vocab_size,
        )
        return ObjectiveOutput(found.loss_sum, {"nll": found.nll_sum, "divergence": found.divergence_sum})

    def _teacher_of(self, batch: Batch, supervised_BT: Tensor) -> TeacherChunk:
        if isinstance(batch, TaughtBatch):
            ids_NK = batch.teacher_ids_BTK[supervised_BT].long()
            # Rounded to 16 bits they do not quite sum to one.
            logprobs_NK = batch.teacher_logprobs_BTK[supervised_BT].float().log_softmax(1)
            return lambda chunk: (logprobs_NK[chunk], ids_NK[chunk])
        assert self.teacher is not None
        teacher, temperature = self.teacher, self.loss.temperature
        with torch.no_grad():
            hidden_ND = hidden_states(teacher, batch)[supervised_BT]
        return lambda chunk: (soft_logprobs(teacher, hidden_ND[chunk], temperature, self.vocab_size), None)


def soft_logprobs(teacher: CausalLM, hidden_ND: Tensor, temperature: float, vocab_size: int) -> Tensor:
    """The teacher's log-probabilities at a temperature over the tokens that the tokenizer has: [N, vocab_size]."""
    return torch.log_softmax(teacher.logits(hidden_ND)[:, :vocab_size] / temperature, dim=1)


def teacher_store(
    teacher: CausalLM,
    dataset: PackedRows,
    cache: Path,
    data_key: str,
    config: DistillationLossConfig,
    *,
    vocab_size: int,
    rows_at_once: int,
) -> TaughtRows:
    """Ask the teacher about every row once, or open what it said the last time: arrays mapped from disk.

    A position takes k x 4 bytes (6 above a vocabulary of 65,536) and 2 for the rest: as what the 16-bit numbers leave
    to one it would be lost in their rounding, and a student that is less sure would seem 80 nats away. data_key stands
    for the documents and how they are packed; the folder's name hashes it with the teacher's weights and shape, k and
    the temperature. DiskFull where it finds no room.
    """
    asked = [data_key, config.top_k, config.temperature, "with the rest"]
    key = [weights_fingerprint(teacher), str(teacher.compute_dtype), *asked]
    folder = cache / f"teacher-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}"
    if not folder.exists():
        with told_when_full(folder), new_folder_beside(folder) as temporary:
            _ask(teacher, dataset, temporary, config, vocab_size, rows_at_once)
            try:
                os.replace(temporary, folder)
            except OSError:
                if not folder.exists():  # else another run has asked the same teacher meanwhile, and was quicker
                    raise
    ids, logprobs = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "logprobs"))
    return TaughtRows(dataset, ids, logprobs)


@torch.no_grad()
def _ask(
    teacher: CausalLM,
    dataset: PackedRows,
    folder: Path,
    config: DistillationLossConfig,
    vocab_size: int,
    rows_at_once: int,
) -> None:
    device = teacher.head_weight.device
    k = min(config.top_k, vocab_size)
    R, T = dataset.num_rows, dataset.sequence_length
    ids_dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
    teacher.eval()
    # Written, not mapped: of a full disk a write tells, while a mapped page without room ends the process (SIGBUS).
    with (
        _npy(folder / "ids.npy", ids_dtype, (R, T, k)) as ids,
        _npy(folder / "logprobs.npy", np.dtype(np.float16), (R, T, k + 1)) as logprobs,
    ):
        for start in range(0, R, rows_at_once):
            batch = dataset.batch(range(start, min(start + rows_at_once, R))).to(device)
            hidden_BTD = hidden_states(teacher, batch)
            for chunk_CD in hidden_BTD.flatten(0, 1).split(CHUNK_SIZE):
                logprobs_CV = soft_logprobs(teacher, chunk_CD, config.temperature, vocab_size)
                ids_CK = logprobs_CV.topk(k, dim=1).indices
                ids.write(ids_CK.cpu().numpy().astype(ids_dtype).tobytes())
                logprobs.write(top_k_outcomes(logprobs_CV, ids_CK).cpu().numpy().astype(np.float16).tobytes())


@contextmanager
def _npy(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A file of numpy's whose array of `shape` is written into it piece by piece; on disk when the context ends."""
    with open(path, "wb") as file:
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        yield file
        file.flush()
        os.fsync(file.fileno())
