# ruff: noqa: N815 (fields carry their shape)
"""Batches: what rows of packed documents look like as tensors, and how processes share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from minnow.config import UserError
from minnow.data.packing import PackPlan, pack, pack_groups
from minnow.data.shards import Shards
from minnow.data.shuffle import hash_of
from minnow.data.windows import ShuffledWindows, Windows
from minnow.transfer import to_device

OPEN_WINDOWS = 2
"""Windows in memory: a batch may end one and begin the next."""
_DECODERS = 4  # threads: PIL lets go of Python's lock while it decodes


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
    document_ids: tuple[tuple[int, ...], ...]
    """Documents of each row, in order."""
    supervised_S: Tensor | None = field(default=None, kw_only=True)
    """int64: where the flattened targets have a weight; `to` looks, as asking the device would make the host wait."""
    pixels_ICHW: Tensor | None = field(default=None, kw_only=True)
    """uint8 [pictures, 3, size, size], in the order in which they stand in the rows; None where there are none."""
    image_places_M: Tensor | None = field(default=None, kw_only=True)
    """int64: places of the image tokens in the flattened positions, picture after picture."""

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


@dataclass(frozen=True)
class PackedWindow:
    """The rows of one window: its shards' documents packed into rows."""

    shards: Shards
    plan: PackPlan

    def batch(self, row_indices: Sequence[int] | np.ndarray) -> Batch:
        """Read rows of the plan into a Batch, in the order given."""
        plan, T = self.plan, self.plan.sequence_length
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
        tokens[places], targets[places], weights[places] = ids[inputs], piece_targets, piece_weights
        positions[places], filler[places] = offsets, False
        filler_at = np.flatnonzero(filler)
        positions[filler_at] = filler_at % T - used[filler_at // T]
        borders = np.sort(np.concatenate([begins, filler_begins, [B * T]])).astype(np.int32)

        shown = self.shards.pictures(documents)
        pixels, image_places = None, None
        if shown:
            image_format = self.shards.image_format
            assert image_format is not None
            with ThreadPoolExecutor(_DECODERS) as pool:
                pixels = torch.from_numpy(np.stack([*pool.map(image_format.pixels, (data for _, _, data in shown))]))
            # A document that shows pictures is one piece, so a place in it is a place in the piece.
            first_places = np.array([begins[piece] + place for piece, place, _ in shown], np.int64)
            image_places = torch.from_numpy((first_places[:, None] + np.arange(image_format.num_tokens)).ravel())

        def rows_BT(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).view(B, T)

        return Batch(
            tokens_BT=rows_BT(tokens),
            targets_BT=rows_BT(targets),
            weights_BT=rows_BT(weights),
            positions_BT=rows_BT(positions),
            cu_seqlens=torch.from_numpy(borders),
            filler_BT=rows_BT(filler),
            document_ids=tuple(
                tuple(part.tolist()) for part in np.split(self.shards.numbers(documents), piece_ends[:-1])
            ),
            pixels_ICHW=pixels,
            image_places_M=image_places,
        )


class PackedRows:
    """The rows of one split, window after window, of which OPEN_WINDOWS are in memory.

    group: so many documents that follow one another share a row, in order (2 for pairs); they are not split.
    """

    def __init__(
        self, windows: Windows, sequence_length: int, *, split_documents: bool, group: int = 1, seed: int = 0
    ) -> None:
        assert group == 1 or not split_documents, "documents that share a row are not split"
        self.windows, self.sequence_length = windows, sequence_length
        self.split_documents, self.group, self.seed = split_documents, group, seed
        self._open: dict[int, PackedWindow] = {}
        self._ends = [0]  # row numbers at which the windows seen so far end
        self._positions = 0  # of these windows

    @property
    def window_rows(self) -> Iterator[int]:
        """Rows of each window, one after the other: the next is looked at when it is asked for."""
        number = 0
        while self._see(number):
            yield self._ends[number + 1] - self._ends[number]
            number += 1

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self.window_rows)

    @property
    def num_positions(self) -> int:
        """Real positions of one epoch, filler not counted."""
        for _ in self.window_rows:
            pass
        return self._positions

    @property
    def fill(self) -> float:
        """Real positions as a share of all, 0 to 1."""
        return self.num_positions / max(1, self.num_rows * self.sequence_length)

    def window_fill(self, number: int) -> float:
        """Real positions of one window as a share of all, 0 to 1; 0 past the last one."""
        window = self._window(number)
        return 0.0 if window is None else window.plan.fill

    def batch(self, row_indices: Sequence[int] | np.ndarray) -> Batch:
        """Read rows into a Batch, in the order given. They are numbered through all windows."""
        rows = np.asarray(row_indices, dtype=np.int64)
        while self._ends[-1] <= rows.max():
            found = self._see(len(self._ends) - 1)
            assert found, "there is no such row"
        windows = np.searchsorted(self._ends, rows, side="right") - 1
        borders = np.flatnonzero(np.diff(windows)) + 1
        parts = []
        for part in np.split(np.arange(len(rows)), borders):
            number = int(windows[part[0]])
            window = self._window(number)
            assert window is not None
            parts.append(window.batch(rows[part] - self._ends[number]))
        return parts[0] if len(parts) == 1 else _join(parts)

    def lacking(self, row: int) -> str | None:
        """Say what is waited for before row `row`, counted on through epochs, can be read; None if for nothing."""
        while self._ends[-1] <= row:
            number = len(self._ends) - 1
            if missing := self.windows.lacking(number):
                return missing
            if not self._see(number):
                return None  # an epoch is shorter
        return None

    def _see(self, number: int) -> bool:
        """Learn how many rows a window has, the ones before it being known; False past the last one."""
        if number + 1 < len(self._ends):
            return True
        window = self._window(number)
        if window is None:
            return False
        self._ends.append(self._ends[-1] + window.plan.num_rows)
        self._positions += window.plan.num_positions
        return True

    def _window(self, number: int) -> PackedWindow | None:
        if number not in self._open:
            shards = self.windows.window(number)
            if shards is None:
                return None
            if len(self._open) == OPEN_WINDOWS:
                del self._open[next(iter(self._open))]  # the one opened first
            self._open[number] = PackedWindow(shards, self._plan(shards, number))
        return self._open[number]

    def _plan(self, shards: Shards, number: int) -> PackPlan:
        # The first window's packing is the one of data that has only that: windows came later than runs to reproduce.
        seed = self.seed if number == 0 else hash_of(self.seed, number)
        if self.group > 1:
            return pack_groups(shards.lengths, self.group, self.sequence_length, seed=seed)
        return pack(shards.lengths, self.sequence_length, split=self.split_documents, seed=seed)


class PackedDataset(PackedRows):
    """The rows of a split that is there as a whole: windows are drawn from all of its shards."""

    def __init__(
        self, shards: Shards, sequence_length: int, *, split_documents: bool, group: int = 1, seed: int = 0
    ) -> None:
        windows = ShuffledWindows(shards, seed)
        super().__init__(windows, sequence_length, split_documents=split_documents, group=group, seed=seed)
        self.shards = shards


def _join(batches: Sequence[Batch]) -> Batch:
    """Put the rows of batches one below the other."""
    ends = np.cumsum([0, *(batch.tokens_BT.numel() for batch in batches)]).tolist()
    borders = [batch.cu_seqlens[:-1] + end for batch, end in zip(batches, ends[:-1], strict=True)]
    pixels = [batch.pixels_ICHW for batch in batches if batch.pixels_ICHW is not None]
    places = [
        batch.image_places_M + end
        for batch, end in zip(batches, ends[:-1], strict=True)
        if batch.image_places_M is not None
    ]
    return Batch(
        tokens_BT=torch.cat([batch.tokens_BT for batch in batches]),
        targets_BT=torch.cat([batch.targets_BT for batch in batches]),
        weights_BT=torch.cat([batch.weights_BT for batch in batches]),
        positions_BT=torch.cat([batch.positions_BT for batch in batches]),
        cu_seqlens=torch.cat([*borders, torch.tensor([ends[-1]], dtype=torch.int32)]),
        filler_BT=torch.cat([batch.filler_BT for batch in batches]),
        document_ids=tuple(row for batch in batches for row in batch.document_ids),
        pixels_ICHW=torch.cat(pixels) if pixels else None,
        image_places_M=torch.cat(places) if places else None,
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
