"""Held-out figures for the Trainer: bits per byte of a language model, or a stage's own objective and its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch

from minnow.data.batches import Batch
from minnow.model.slices import examined
from minnow.model.transformer import CausalLM
from minnow.objectives.lm import bits_per_byte, token_logprobs
from minnow.training.distribution import rank, sum_over_ranks, world_size
from minnow.training.forward import hidden_states
from minnow.training.objective import BatchT, LooksAhead, Objective

Evaluation = Callable[[CausalLM], dict[str, float]]
"""Figures of a model by name. The Trainer's `validation` gives `validation_loss`, by which models are compared."""


@dataclass(frozen=True)
class Validation:
    """Held-out figures of one model on one set of batches."""

    loss: float
    """Nats per weighted target."""
    bits_per_byte: float
    """Nats of the weighted targets that stand for text / (ln 2 x their UTF-8 bytes)."""


def validate(model: CausalLM, batches: Sequence[Batch], token_bytes: np.ndarray, device: torch.device) -> Validation:
    """Score `model` on `batches`, which are the same on every process: each scores its part.

    `token_bytes` is int32 [vocab], the bytes each token stands for. Special tokens stand for none: they count in the
    loss and not in bits per byte, so that the figure compares across tokenizers.
    """
    bytes_of_token = torch.from_numpy(token_bytes)
    nats = weight = text_nats = text_bytes = 0.0
    with examined(model):
        for batch, is_mine in _my_part(batches):
            batch = batch.to(device)
            hidden_BTD = hidden_states(model, batch)
            supervised_BT = batch.weights_BT > 0
            targets_N, weights_N = batch.targets_BT[supervised_BT], batch.weights_BT[supervised_BT].cpu()
            # On the host: Apple's GPUs have no float64.
            nll_N = -token_logprobs(hidden_BTD[supervised_BT], model.head_weight, targets_N).cpu().double()
            if not is_mine:
                continue
            bytes_N = bytes_of_token[targets_N.cpu()]
            nats += float((nll_N * weights_N).sum())
            weight += float(weights_N.sum())
            text_nats += float(nll_N[bytes_N > 0].sum())
            text_bytes += float(bytes_N.sum())
    nats, weight, text_nats, text_bytes = sum_over_ranks([nats, weight, text_nats, text_bytes])
    return Validation(
        loss=nats / weight if weight else math.nan,
        bits_per_byte=bits_per_byte(text_nats, text_bytes) if text_bytes else math.nan,
    )


@dataclass(frozen=True)
class LanguageModelValidation:
    """The Trainer's validation for next-token losses: `validate` on fixed batches."""

    batches: Sequence[Batch]
    token_bytes: np.ndarray
    device: torch.device

    def __call__(self, model: CausalLM) -> dict[str, float]:
        """Return `validation_loss` and `bits_per_byte`."""
        result = validate(model, self.batches, self.token_bytes, self.device)
        return {"validation_loss": result.loss, "bits_per_byte": result.bits_per_byte}


@dataclass(frozen=True)
class ObjectiveValidation(Generic[BatchT]):
    """The Trainer's validation for any objective: its mean loss and metrics over fixed batches."""

    objective: Objective[BatchT]
    batches: Sequence[BatchT]
    device: torch.device

    def __call__(self, model: CausalLM) -> dict[str, float]:
        """Return `validation_loss`, and each metric as `validation_NAME`."""
        sums: dict[str, float] = {}
        with examined(model):
            if isinstance(self.objective, LooksAhead):
                # With fewer batches than processes each sees them all: nobody may see nothing, and none counts oftener.
                shared_out = len(self.batches) >= world_size()
                self.objective.look_ahead(model, self.batches[rank() :: world_size()] if shared_out else self.batches)
            for batch, is_mine in _my_part(self.batches):
                output = self.objective(model, batch.to(self.device))
                for name, value in {"loss": output.loss_sum, **output.metrics}.items():
                    sums[name] = sums.get(name, 0.0) + is_mine * float(value)
        count = sum(self.objective.count(batch) for batch in self.batches)
        totals = sum_over_ranks(list(sums.values()))
        return {f"validation_{name}": total / count for name, total in zip(sums, totals, strict=True)}


def _my_part(batches: Sequence[BatchT]) -> Iterator[tuple[BatchT, bool]]:
    """Yield every `world_size`-th batch; a process that has one less runs its last once more, for company's sake.

    Slices of a sharded model are gathered in each forward pass, so all processes must make the same number of them.
    """
    for start in range(0, len(batches), world_size()):
        index = start + rank()
        yield batches[min(index, len(batches) - 1)], index < len(batches)
