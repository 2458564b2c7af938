# ruff: noqa: N815 (fields carry their shape)
"""Batches: which rows make up a step, and what a row of packed documents looks like as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from minnow.config import UserError
from minnow.data.packing import PackPlan, pack, pack_groups
from minnow.data.shards import Shards
from minnow.data.shuffle import permutation
from minnow.transfer import to_device

_EPOCH = 0xE90C  # keeps the row order apart from other shuffles with the same seed


@dataclass(frozen=True)
class Batch:
    """B rows of T positions. A row is pieces of documents, one after the other, and filler at its end."""

    tokens_BT: Tensor
    """int64: input ids; 0 on filler."""
    targets_BT: Tensor
    """int64: the next token of the same document; 0 where the weight is 0."""
    weights_BT: Tensor
    """float32: loss weight of the target; 0 on filler and on what is not trained on."""
    positions_BT: Tensor
    """int64: position in the piece; each piece, and the filler, starts at 0."""
    cu_seqlens: Tensor
    """int32 [pieces + 1], on the CPU: borders of the pieces in the B * T flattened positions, a row's filler being
    one piece of its own. From 0 to B * T."""
    filler_BT: Tensor
    """bool: True where a row has nothing."""
    text_bytes: float
    """UTF-8 bytes of the text that the supervised targets stand for (control tokens stand for none)."""
    document_ids: tuple[tuple[int, ...], ...]
    """Documents of each row, in order."""
    supervised_S: Tensor | None = field(default=None, kw_only=True)
    """int64: where the flattened targets have a weight; `to` looks, as asking the device would make the host wait."""

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with its tensors on `device`; `cu_seqlens` stays on the CPU."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        del tensors["cu_seqlens"]
        tensors["supervised_S"] = self.weights_BT.flatten().nonzero().squeeze(1)
        moved: dict[str, Any] = {name: to_device(tensor, device) for name, tensor in tensors.items()}
        return replace(self, **moved)

    @property
    def num_real_tokens(self) -> int:
        """Positions that are not filler."""
        return int(self.filler_BT.numel() - self.filler_BT.sum())


class PackedDataset:
    """The rows of one split: documents of `shards` packed into rows of `sequence_length` positions.

    group: so many documents that follow one another share a row, in order (2 for pairs); they are not split.
    """

    def __init__(
        self, shards: Shards, sequence_length: int, *, split_documents: bool, group: int = 1, seed: int = 0
    ) -> None:
        assert group == 1 or not split_documents, "documents that share a row are not split"
        self.shards = shards
        self.sequence_length = sequence_length
        self.plan: PackPlan = (
            pack(shards.lengths, sequence_length, split=split_documents, seed=seed)
            if group == 1
            else pack_groups(shards.lengths, group, sequence_length, seed=seed)
        )

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self.plan.num_rows

    @property
    def num_positions(self) -> int:
        """Real positions of one epoch, filler not counted."""
        return self.plan.num_positions

    @property
    def fill(self) -> float:
        """Real positions as a share of all, 0 to 1."""
        return self.plan.fill

    def batch(self, row_indices: Sequence[int] | np.ndarray) -> Batch:
        """Read rows of the plan into a Batch, in the order given."""
        plan, T = self.plan, self.sequence_length
        rows = np.asarray(row_indices, dtype=np.int64)
        B = len(rows)
        first, counts = plan.row_starts[rows], plan.row_starts[rows + 1] - plan.row_starts[rows]
        piece_ends = np.cumsum(counts)
        pieces = np.arange(counts.sum()) + np.repeat(first - (piece_ends - counts), counts)
        documents, starts, lengths = plan.documents[pieces], plan.starts[pieces], plan.lengths[pieces]

        # Where each piece begins in the flattened batch: its row's start plus the pieces of the row before it.
        before = np.cumsum(lengths) - lengths
        row_of_piece = np.repeat(np.arange(B), counts)
        row_before = np.append(before, lengths.sum())[piece_ends - counts]
        begins = row_of_piece * T + before - row_before[row_of_piece]
        used = np.bincount(row_of_piece, weights=lengths, minlength=B).astype(np.int64)
        filler_begins = (np.arange(B) * T + used)[used < T]

        offsets = np.arange(lengths.sum()) - np.repeat(before, lengths)
        places = np.repeat(begins, lengths) + offsets
        tokens, targets, positions = (np.zeros(B * T, np.int64) for _ in range(3))
        weights = np.zeros(B * T, np.float32)
        filler = np.ones(B * T, bool)
        # A piece is read with its last target; inputs and targets are the two shifted views of that one read.
        ids = self.shards.gather(documents, starts, lengths + 1, weights=False)
        inputs = np.arange(lengths.sum()) + np.repeat(np.arange(len(lengths)), lengths)
        piece_weights: np.ndarray | float = 1.0
        piece_targets = ids[inputs + 1]
        if self.shards.has_weights:
            piece_weights = self.shards.gather(documents, starts + 1, lengths, weights=True)
            piece_targets = np.where(piece_weights != 0, piece_targets, 0)
            text_bytes = self.shards.token_bytes[piece_targets][piece_weights != 0].sum()
        else:
            text_bytes = self.shards.token_bytes[piece_targets].sum()
        tokens[places], targets[places], weights[places] = ids[inputs], piece_targets, piece_weights
        positions[places], filler[places] = offsets, False
        filler_at = np.flatnonzero(filler)
        positions[filler_at] = filler_at % T - used[filler_at // T]
        borders = np.sort(np.concatenate([begins, filler_begins, [B * T]])).astype(np.int32)

        def rows_BT(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).view(B, T)

        return Batch(
            tokens_BT=rows_BT(tokens),
            targets_BT=rows_BT(targets),
            weights_BT=rows_BT(weights),
            positions_BT=rows_BT(positions),
            cu_seqlens=torch.from_numpy(borders),
            filler_BT=rows_BT(filler),
            text_bytes=float(text_bytes),
            document_ids=tuple(tuple(part.tolist()) for part in np.split(documents, piece_ends[:-1])),
        )


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return permutation(num_rows, seed, _EPOCH, epoch)


def global_batch_rows(seed: int, step: int, rows_per_batch: int, num_rows: int) -> np.ndarray:
    """Return the rows of step `step` (from 0), int64 [rows_per_batch], all ranks and micro-batches together.

    Steps read on through endless epochs, each its own shuffle of all rows: every row once an epoch, and a batch may
    hold the end of one epoch and the start of the next. Pure: resuming needs only the step.
    """
    places = step * rows_per_batch + np.arange(rows_per_batch)
    epochs, rows = np.divmod(places, num_rows)
    return np.concatenate(
        [_epoch_order(seed, epoch, num_rows)[rows[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
    )


@dataclass(frozen=True)
class Share:
    """One process's part of each global batch."""

    rank: int = 0
    """Which process, from 0."""
    world_size: int = 1
    """How many there are."""

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return this process's contiguous part; together the parts hold each row once, in order.

        They differ by at most one row where `world_size` does not divide the batch.
        """
        return np.array_split(rows, self.world_size)[self.rank]

    def first_row(self, rows: int) -> int:
        """Place, in a global batch of `rows` rows, of the first one that is this process's."""
        return int(self.of(np.arange(rows))[0])

    def cut(self, rows: np.ndarray, rows_per_micro_batch: int) -> list[np.ndarray]:
        """Cut this process's part into micro-batches of at most that many rows: as many as every other process has.

        All processes meet in every backward pass, so none may have one less. UserError where no cut is even.
        """
        largest = -(-len(rows) // self.world_size)
        pieces = -(-largest // rows_per_micro_batch)
        if pieces > len(rows) // self.world_size:
            raise UserError(
                f"{len(rows)} rows a batch, {rows_per_micro_batch} at a time, cannot be shared evenly by "
                f"{self.world_size} processes: make training.batch_tokens a multiple of sequence_length x processes"
            )
        return np.array_split(self.of(rows), pieces)
