"""Keeping a mixture's experts evenly loaded during training, and measuring it.

The balance losses need the loads of the whole global batch before the first backward pass. By default they are those of
the batch before, as for the selection bias: one pass, and statistics that are one update old. Or they are measured
first, in a forward pass of its own. Either way a gradient is the same however the batch is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minnow.config import UserError
from minnow.data.batches import Batch
from minnow.model.moe import Decisions, MoE, Routing
from minnow.model.transformer import CausalLM
from minnow.objectives.balance import (
    bias_step,
    expert_counts,
    kl_to_uniform_slope,
    load_balance_loss,
    load_balance_slope,
    sequence_balance_sum,
)
from minnow.training.distribution import sum_over_ranks
from minnow.training.forward import hidden_states

_NOISE = 0x201E  # keeps the routers' noise apart from other random numbers of the same seed


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How the experts of a mixture are kept evenly loaded; nothing of it matters to a dense model."""

    load_loss: float | None = None
    """Weight of the load-balance loss of each layer, over the global batch (2101.03961). null: 0.01 for softmax
    routers, 0 for noisy ones (kl_loss) and for sigmoid ones (bias_rate)."""
    kl_loss: float | None = None
    """Weight of KL(uniform || mean probabilities) of each layer, over the global batch. null: 0.05 for noisy routers,
    else 0."""
    sequence_loss: float | None = None
    """Weight of the load-balance loss within each document (2412.19437). null: 0.0001 for sigmoid routers, else 0."""
    loads: Literal["last_batch", "same_batch"] = "last_batch"
    """Global batch whose loads weigh load_loss and kl_loss: the one before, or the same one, which takes a forward
    pass more."""
    bias_rate: float = 0.001
    """Sigmoid routers: how far each update moves the selection bias of an expert with too much or too little load
    (2408.15664)."""

    def __post_init__(self) -> None:
        for name in ("load_loss", "kl_loss", "sequence_loss", "bias_rate"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"training.balance.{name} is {value}: give 0 or more")


class ExpertBalance:
    """The balance losses and selection biases of a model's routers, over the updates of a run.

    For each micro-batch: `watch` its forward passes, then add `loss_sum` / tokens of the global batch to the loss.
    After the last one, `update` moves the biases and keeps the statistics for the next step.
    """

    def __init__(self, model: CausalLM, config: BalanceConfig, seed: int) -> None:
        experts = model.config.experts
        assert experts is not None, "a dense model has nothing to balance"
        sigmoid = experts.scoring == "sigmoid"
        plain = not sigmoid and not experts.noisy
        self.load_loss = (0.01 if plain else 0.0) if config.load_loss is None else config.load_loss
        self.kl_loss = (0.05 if experts.noisy else 0.0) if config.kl_loss is None else config.kl_loss
        self.sequence_loss = (0.0001 if sigmoid else 0.0) if config.sequence_loss is None else config.sequence_loss
        self.bias_rate = config.bias_rate
        self.measures_first = config.loads == "same_batch"
        self.model, self.experts, self.seed = model, experts, seed
        self.routers = {
            index: layer.mlp.gate for index, layer in enumerate(model.model.layers) if isinstance(layer.mlp, MoE)
        }
        self._row_of_layer = {layer: row for row, layer in enumerate(self.routers)}
        # Of the last global batch; even before the first one.
        self._counts_LE = self._ones()
        self._probability_sums_LE = self._ones()
        self._forget()

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], step: int, first_row: int) -> None:
        """Take the loads from a forward pass over all micro-batches of the step; every process must call it."""
        for batch in batches:
            batch = batch.to(next(self.model.parameters()).device)
            with self.watch(batch, step=step, first_row=first_row) as routing:
                hidden_states(self.model, batch)
            for layer, decisions in routing.decisions:
                self._record(self._row_of_layer[layer], decisions, decisions.probabilities_NE.sum(0))
            first_row += len(batch.tokens_BT)
        self._counts_LE, self._probability_sums_LE, _, _ = self._global_statistics()
        self._forget()

    @contextmanager
    def watch(self, batch: Batch, *, step: int, first_row: int) -> Iterator[Routing]:
        """Let the model's routers report on `batch`, whose first row is number `first_row` of the global batch."""
        noise = self._noise(batch, step, first_row) if self.experts.noisy else None
        self.model.routing = Routing(batch.filler_BT, noise)
        try:
            yield self.model.routing
        finally:
            self.model.routing = None

    def loss_sum(self, routing: Routing, batch: Batch) -> Tensor:
        """Weighted balance losses of a watched micro-batch, summed over tokens and layers: 0-D fp32, with gradient."""
        slope_LE = self.load_loss * load_balance_slope(self._counts_LE)
        if self.kl_loss:  # its slope is infinite for an expert that no token gave any probability
            slope_LE = slope_LE + self.kl_loss * kl_to_uniform_slope(self._probability_sums_LE)
        slope_LE = slope_LE.float().to(batch.tokens_BT.device)
        total = torch.zeros((), device=batch.tokens_BT.device)
        for layer, decisions in routing.decisions:
            row = self._row_of_layer[layer]
            sums_E = decisions.probabilities_NE.sum(0)
            self._record(row, decisions, sums_E)
            total = total + (slope_LE[row] * sums_E).sum()
            if self.sequence_loss:
                sequence_sum = sequence_balance_sum(*decisions, _pieces(batch, routing))
                total = total + self.sequence_loss * sequence_sum
        return total

    def update(self, *, apply: bool = True) -> dict[str, float]:
        """End a step: move the biases, keep the statistics; returns the figures of the step, means over layers.

        apply: whether the weights were updated; if not (overflow, or nothing to learn), biases and statistics stay as
        they were.
        """
        counts_LE, sums_LE, entropy_L, tokens_L = self._global_statistics()
        shares_LE = counts_LE / counts_LE.sum(-1, keepdim=True) * counts_LE.shape[-1]
        figures = {
            "balance_loss": float(load_balance_loss(counts_LE, sums_LE).mean()),
            "expert_load_max": float(shares_LE.max(-1).values.mean()),
            "expert_load_min": float(shares_LE.min(-1).values.mean()),
            "router_entropy": float((entropy_L / tokens_L).mean()),
            "dropped_share": 1 - float(counts_LE.sum() / (self.experts.num_experts_per_tok * tokens_L.sum())),
        }
        if apply:
            self._counts_LE, self._probability_sums_LE = counts_LE, sums_LE
            with torch.no_grad():
                for step_E, router in zip(bias_step(counts_LE), self.routers.values(), strict=True):
                    if router.e_score_correction_bias is not None:
                        router.e_score_correction_bias += self.bias_rate * step_E.to(router.e_score_correction_bias)
        self._forget()
        return figures

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the model (which has the biases): plain JSON."""
        return {"counts": self._counts_LE.tolist(), "probability_sums": self._probability_sums_LE.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._counts_LE = torch.tensor(state["counts"], dtype=torch.float64)
        self._probability_sums_LE = torch.tensor(state["probability_sums"], dtype=torch.float64)

    def _record(self, row: int, decisions: Decisions, sums_E: Tensor) -> None:
        """Keep what a layer reports on the device: to read it now, the host would wait for each layer."""
        probabilities_NE = decisions.probabilities_NE.detach()
        counts_E = expert_counts(decisions.experts_Nk, self.experts.num_experts)
        entropy_1 = torch.special.entr(probabilities_NE).sum().reshape(1)
        self._reports.append((row, len(probabilities_NE), torch.cat([counts_E.float(), sums_E.detach(), entropy_1])))

    def _global_statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choices and sums of probabilities [L, E], entropies and tokens [L], of all processes."""
        layers, experts = self._counts_LE.shape
        table_LX = torch.zeros(layers, 2 * experts + 2, dtype=torch.float64)
        # In this order: not every device has float64.
        reported = torch.stack([report_X for _, _, report_X in self._reports]).cpu().double()
        for (row, tokens, _), report_X in zip(self._reports, reported, strict=True):
            table_LX[row, :-1] += report_X
            table_LX[row, -1] += tokens
        total_LX = torch.tensor(sum_over_ranks(table_LX.flatten().tolist()), dtype=torch.float64).view(layers, -1)
        counts_LE, sums_LE, entropy_L1, tokens_L1 = total_LX.split([experts, experts, 1, 1], dim=1)
        return counts_LE, sums_LE, entropy_L1.squeeze(1), tokens_L1.squeeze(1)

    def _forget(self) -> None:
        self._reports: list[tuple[int, int, Tensor]] = []

    def _ones(self) -> Tensor:
        return torch.ones(len(self.routers), self.experts.num_experts, dtype=torch.float64)

    def _noise(self, batch: Batch, step: int, first_row: int) -> Callable[[int], Tensor]:
        """Noise that depends on seed, step, layer and place in the global batch alone, not on how the batch is cut."""
        rows, length = batch.tokens_BT.shape

        def of_layer(layer: int) -> Tensor:
            keys = ((_NOISE, self.seed, step, layer, row) for row in range(first_row, first_row + rows))
            drawn = [np.random.default_rng(key).standard_normal((length, self.experts.num_experts)) for key in keys]
            return torch.from_numpy(np.stack(drawn)).to(batch.tokens_BT.device, torch.float32)

        return of_layer


def _pieces(batch: Batch, routing: Routing) -> Tensor:
    """Number of the piece each real token belongs to: int64 [N]. Every piece begins at position 0."""
    pieces_N = (batch.positions_BT == 0).flatten().cumsum(0) - 1
    return pieces_N if routing.real_N is None else pieces_N.index_select(0, routing.real_N)
