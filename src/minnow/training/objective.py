"""What a stage supplies to the Trainer: where batches come from, and what to minimise on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from minnow.config import UserError
from minnow.data.batches import Batch, PackedRows, Share
from minnow.data.order import windowed_batch_rows
from minnow.model.transformer import CausalLM
from minnow.objectives.lm import linear_cross_entropy
from minnow.training.distribution import sum_over_ranks
from minnow.training.forward import hidden_states

# A stage's own batches are Batches with more in them (reference log-probabilities, a teacher's logits, advantages).
BatchT = TypeVar("BatchT", bound=Batch)
BatchT_co = TypeVar("BatchT_co", bound=Batch, covariant=True)
BatchT_contra = TypeVar("BatchT_contra", bound=Batch, contravariant=True)


@dataclass(frozen=True)
class ObjectiveOutput:
    """A micro-batch's loss as a *sum*; the Trainer divides it by the count of the whole global batch."""

    loss_sum: Tensor
    """() float32, differentiable."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Further sums, () each, to be divided by the same count and logged by these names."""


def totals(outputs: Sequence[ObjectiveOutput]) -> dict[str, float]:
    """Add up loss and metrics over micro-batches and processes; read from the device once."""
    names = ["loss", *outputs[0].metrics]
    table = torch.stack([torch.stack([o.loss_sum, *o.metrics.values()]).detach() for o in outputs]).tolist()
    sums = [
        math.fsum(column) if all(map(math.isfinite, column)) else sum(column)  # fsum refuses inf - inf
        for column in zip(*table, strict=True)
    ]
    return dict(zip(names, sum_over_ranks(sums), strict=True))


class Objective(Protocol[BatchT_contra]):
    """Loss = sum over the global batch / count over the global batch, whatever the split into micro-batches."""

    def count(self, batch: BatchT_contra) -> float:
        """What the sum is divided by: supervised tokens, the sum of their weights, pairs or sequences."""
        ...

    def __call__(self, model: CausalLM, batch: BatchT_contra) -> ObjectiveOutput:
        """Run the model on one micro-batch."""
        ...


@runtime_checkable
class LooksAhead(Protocol[BatchT_contra]):
    """An Objective that needs a figure of the whole global batch before any of it is minimised."""

    def look_ahead(self, model: CausalLM, batches: Sequence[BatchT_contra]) -> None:
        """See this process's micro-batches; called before the first of them, on all processes."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """An Objective that may want an update left out, once its figures are known."""

    def leaves_out(self, figures: Mapping[str, float]) -> bool:
        """Whether the optimizer is not to step; `figures` are the means over the whole global batch."""
        ...


class BatchSource(Protocol[BatchT_co]):
    """Gives a process's share of a step's global batch, cut into micro-batches: a pure function of both."""

    def micro_batches(self, step: int, share: Share) -> Sequence[BatchT_co]:
        """Return the micro-batches of `step` (from 0); as many for every share (`Share.cut` sees to it)."""
        ...


@runtime_checkable
class Growing(Protocol):
    """A BatchSource whose data is still being written: the Trainer waits for it."""

    def lacking(self, step: int) -> str | None:
        """Say what `step` waits for, None when it can be read. Raises UserError when it will not come."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """A BatchSource that remembers something between steps: the Trainer keeps it in checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        ...


@runtime_checkable
class Doubting(Protocol):
    """A BatchSource that sees whether the model has gone bad: the Trainer keeps a checkpoint from before."""

    @property
    def doubted_since(self) -> int | None:
        """Updates that were done when the doubts began; None while there are none."""
        ...


class SourceStopsError(UserError):
    """A BatchSource sees no sense in going on. The Trainer saves what is there, and passes the error on."""


@dataclass(frozen=True)
class LanguageModeling:
    """Next-token cross-entropy over the weighted targets, with z-loss (PaLM, arXiv 2204.02311, section 5)."""

    z_loss: float = 0.0

    def count(self, batch: Batch) -> float:
        """Sum of the targets' weights."""
        return float(batch.weights_BT.sum())

    def __call__(self, model: CausalLM, batch: Batch) -> ObjectiveOutput:
        """Return the weighted nats (and the z-loss) of one packed micro-batch."""
        hidden_BTD = hidden_states(model, batch)
        loss = linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            model.head_weight,
            batch.targets_BT.flatten(),
            batch.weights_BT.flatten(),
            z_loss=self.z_loss,
            compiled=model.is_compiled,
            supervised_S=batch.supervised_S,
        )
        return ObjectiveOutput(loss.loss_sum, {"nll": loss.nll_sum})


class Rows(Protocol[BatchT_co]):
    """A data set of rows: `PackedDataset`, or one that adds something to its batches."""

    @property
    def window_rows(self) -> Iterator[int]:
        """Rows of each window of an epoch, one after the other; of what has no windows, all rows."""
        ...

    def batch(self, row_indices: Sequence[int] | np.ndarray) -> BatchT_co:
        """Read rows into a batch, in the order given."""
        ...


@dataclass(frozen=True)
class PackedBatches(Generic[BatchT]):
    """Global batches of packed rows in an order that depends on (seed, step) alone."""

    dataset: Rows[BatchT]
    seed: int
    rows_per_batch: int
    rows_per_micro_batch: int

    def micro_batches(self, step: int, share: Share) -> list[BatchT]:
        """Return the share's rows, at most `rows_per_micro_batch` at a time."""
        rows = windowed_batch_rows(self.seed, step, self.rows_per_batch, lambda: self.dataset.window_rows)
        return [self.dataset.batch(part) for part in share.cut(rows, self.rows_per_micro_batch)]


@dataclass(frozen=True)
class StreamedBatches(PackedBatches[BatchT]):
    """Global batches of rows that are still being written."""

    written: PackedRows
    """The rows below `dataset`."""

    def lacking(self, step: int) -> str | None:
        """See `Growing`."""
        return self.written.lacking((step + 1) * self.rows_per_batch - 1)
