# ruff: noqa: N815 (fields carry their shape)
"""Trajectories as packed batches, and the policy's objective on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minnow.data.batches import Batch
from minnow.data.packing import pack
from minnow.model.transformer import CausalLM
from minnow.objectives.lm import token_logprobs
from minnow.objectives.policy import (
    PolicyLossConfig,
    aggregation_count,
    policy_loss,
    token_weights,
)
from minnow.rl.rollouts import Trajectory
from minnow.training.forward import hidden_states
from minnow.training.objective import ObjectiveOutput


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Whole trajectories in packed rows. N counts the trained tokens, in the order of the flattened rows."""

    sequence_N: Tensor
    """int64: which trajectory of the batch, from 0."""
    num_sequences: int
    """Trajectories in the batch."""
    advantages_N: Tensor
    """float32."""
    old_logprobs_N: Tensor
    """float32: under the policy that began this phase."""
    ref_logprobs_N: Tensor | None
    """float32: under the reference model; None without one."""
    correction_N: Tensor | None
    """float32: truncated weights policy / sampler; None where the sampler is the policy."""


@dataclass(frozen=True)
class PackedTrajectories:
    """Some trajectories in packed rows, without anything computed from them yet."""

    batch: Batch
    """weights_BT is 1 where the model wrote the target."""
    trajectories: tuple[int, ...]
    """Their numbers, in the order of the flattened rows."""
    lengths: tuple[int, ...]
    """Trained tokens of each."""

    @property
    def sequence_N(self) -> Tensor:
        """Which of `trajectories` each trained token is of."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths, dtype=torch.int64))

    def flat(self, per_trajectory: Sequence[np.ndarray]) -> Tensor:
        """Values of the trained tokens of all trajectories of the phase -> those of this batch, [N] float32."""
        chosen = [np.asarray(per_trajectory[number], dtype=np.float32) for number in self.trajectories]
        return torch.from_numpy(np.concatenate(chosen)) if chosen else torch.zeros(0)

    def split(self, values_N: Tensor, out: list[np.ndarray]) -> None:
        """Values of this batch's trained tokens -> `out`, one array a trajectory."""
        parts = values_N.float().cpu().split(self.lengths)
        for number, part in zip(self.trajectories, parts, strict=True):
            out[number] = part.numpy()


def pack_trajectories(
    trajectories: Sequence[Trajectory], chosen: Sequence[int], sequence_length: int, rows_per_batch: int
) -> list[PackedTrajectories]:
    """Pack `chosen` trajectories, each whole, into batches of rows of `sequence_length` positions; no padding."""
    lengths = np.array([len(trajectories[number].ids) for number in chosen], dtype=np.int64)
    plan = pack(lengths, sequence_length, split=False, seed=0)
    batches = []
    for first in range(0, plan.num_rows, rows_per_batch):
        rows = range(first, min(first + rows_per_batch, plan.num_rows))
        placed = [[chosen[d] for d in plan.documents[plan.row_starts[row] : plan.row_starts[row + 1]]] for row in rows]
        batches.append(_batch(trajectories, placed, sequence_length))
    return batches


def nothing(sequence_length: int) -> PackedTrajectories:
    """One row of filler: a micro-batch that teaches nothing and keeps the other processes company."""
    return _batch([], [[]], sequence_length)


def _batch(trajectories: Sequence[Trajectory], placed: Sequence[Sequence[int]], T: int) -> PackedTrajectories:
    B = len(placed)
    tokens_BT, targets_BT = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    weights_BT, positions_BT = np.zeros((B, T), np.float32), np.zeros((B, T), np.int64)
    filler_BT = np.ones((B, T), bool)
    borders = [0]
    for row, numbers in enumerate(placed):
        at = 0
        for number in numbers:
            ids = np.array(trajectories[number].ids, dtype=np.int64)
            here = slice(at, at + len(ids) - 1)
            tokens_BT[row, here], targets_BT[row, here] = ids[:-1], ids[1:]
            weights_BT[row, here] = trajectories[number].trained[1:]
            positions_BT[row, here], filler_BT[row, here] = np.arange(len(ids) - 1), False
            at += len(ids) - 1
            borders.append(row * T + at)
        if at < T:
            positions_BT[row, at:] = np.arange(T - at)
            borders.append((row + 1) * T)
    flat = [number for numbers in placed for number in numbers]
    batch = Batch(
        tokens_BT=torch.from_numpy(tokens_BT),
        targets_BT=torch.from_numpy(targets_BT),
        weights_BT=torch.from_numpy(weights_BT),
        positions_BT=torch.from_numpy(positions_BT),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        filler_BT=torch.from_numpy(filler_BT),
        document_ids=tuple(tuple(numbers) for numbers in placed),
    )
    return PackedTrajectories(batch, tuple(flat), tuple(trajectories[number].num_trained for number in flat))


def trained_logprobs(model: CausalLM, batch: Batch, temperature: float) -> Tensor:
    """Log-probability of each trained token under softmax(logits / temperature), [N] float32; differentiable."""
    hidden_BTD = hidden_states(model, batch)
    trained_BT = batch.weights_BT > 0
    return token_logprobs(hidden_BTD[trained_BT] / temperature, model.head_weight, batch.targets_BT[trained_BT])


@torch.no_grad()
def score_trajectories(
    model: CausalLM, packed: Sequence[PackedTrajectories], total: int, temperature: float
) -> list[np.ndarray]:
    """Log-probabilities of every trajectory's trained tokens under `model`, one float32 array each."""
    device = model.head_weight.device
    out = [np.zeros(0, np.float32)] * total
    for part in packed:
        part.split(trained_logprobs(model, part.batch.to(device), temperature), out)
    return out


@dataclass(frozen=True)
class PolicyObjective:
    """Ratio term x advantage - KL term, on packed trajectories."""

    config: PolicyLossConfig
    temperature: float
    constant_length: int = 1
    """What `aggregation: constant` divides by: the longest an answer can be."""
    target_kl: float | None = None
    """Largest `kl_old` at which an update is still made; None: any."""

    def leaves_out(self, figures: Mapping[str, float]) -> bool:
        """Whether the updates before this one, whose figures these are, have gone far enough; or whether nothing is to
        be learnt, where the balance loss alone would move a mixture of experts."""
        if figures["advantage_share"] == 0 and not (self.config.kl_coef and "kl_reference" in figures):
            return True
        return self.target_kl is not None and figures["kl_old"] > self.target_kl

    def count(self, batch: Batch) -> float:
        """Trained tokens, or trajectories."""
        assert isinstance(batch, PolicyBatch)
        return aggregation_count(len(batch.sequence_N), batch.num_sequences, self.config.aggregation)

    def __call__(self, model: CausalLM, batch: Batch) -> ObjectiveOutput:
        """Run the policy on one micro-batch."""
        assert isinstance(batch, PolicyBatch)
        result = policy_loss(
            trained_logprobs(model, batch, self.temperature),
            batch.old_logprobs_N,
            batch.advantages_N,
            batch.sequence_N,
            self.config,
            batch.ref_logprobs_N,
            batch.correction_N,
        )
        weights_N = token_weights(
            batch.sequence_N, batch.num_sequences, self.config.aggregation, constant_length=self.constant_length
        )
        # Figures are means: of the tokens, or of the answers' own means. A constant length makes none.
        by_token = self.config.aggregation == "token"
        shares_N = token_weights(batch.sequence_N, batch.num_sequences, "token" if by_token else "sequence")
        ratio_N = result.log_ratio_N.exp()
        metrics = {
            "advantage_share": (shares_N * (batch.advantages_N != 0)).sum(),
            "clip_fraction": (shares_N * result.clipped_N).sum(),
            # k3 of the policy against the one that began the phase: how far this phase's updates have gone
            "kl_old": (shares_N * (ratio_N - 1 - result.log_ratio_N)).sum(),
        }
        if batch.ref_logprobs_N is not None:
            metrics["kl_reference"] = (shares_N * result.kl_N).sum()
        return ObjectiveOutput((weights_N * result.loss_N).sum(), metrics)
