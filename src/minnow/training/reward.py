"""The objective of reward modelling on packed pairs, and the figures of a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from minnow.config import UserError
from minnow.data.batches import Batch
from minnow.model.reward_model import RewardModel
from minnow.model.slices import examined
from minnow.model.transformer import CausalLM
from minnow.objectives.reward import bradley_terry_loss
from minnow.training.forward import hidden_states
from minnow.training.objective import ObjectiveOutput
from minnow.training.preference import wins


@dataclass(frozen=True, kw_only=True)
class RewardLossConfig:
    """The loss of a reward model."""

    margin: float = 0.0
    """Nats by which the better answer's reward is to be greater before a pair counts as even."""
    centering: float = 0.01
    """Weight of the squared sum of a pair's rewards, which keeps rewards around zero."""

    def __post_init__(self) -> None:
        if self.centering < 0:
            raise UserError(f"loss.centering is {self.centering}: it must be at least 0")


@dataclass(frozen=True)
class RewardModeling:
    """Bradley-Terry, summed over pairs and counted in pairs."""

    loss: RewardLossConfig

    def count(self, batch: Batch) -> float:
        """Pairs."""
        return sum(map(len, batch.document_ids)) / 2

    def __call__(self, model: CausalLM, batch: Batch) -> ObjectiveOutput:
        """Return the sum of the pairs' losses; accuracy, margin and the mean reward of all answers as metrics."""
        rewards_P2 = packed_rewards(cast(RewardModel, model), batch).view(-1, 2)
        chosen_P, rejected_P = rewards_P2.unbind(1)
        losses_P = bradley_terry_loss(chosen_P, rejected_P, self.loss.margin, self.loss.centering)
        with torch.no_grad():
            metrics = {
                "accuracy": wins(rewards_P2),
                "margin": (chosen_P - rejected_P).sum(),
                "reward": rewards_P2.mean(1).sum(),
            }
        return ObjectiveOutput(losses_P.sum(), metrics)


def packed_rewards(model: RewardModel, batch: Batch) -> Tensor:
    """Rewards of the conversations in packed rows, float32, in order: read at the last position of each piece."""
    device = batch.tokens_BT.device
    hidden_BTD = hidden_states(model, batch)
    last = batch.cu_seqlens[1:].long().to(device) - 1
    last = last[~batch.filler_BT.flatten()[last]]
    return model.rewards(hidden_BTD.flatten(0, 1)[last])


def reward_margins(model: RewardModel, batches: Sequence[Batch]) -> list[float]:
    """How much more each pair's better answer is worth to the model."""
    device = model.score.weight.device
    with examined(model):
        return [
            -float(difference)
            for batch in batches
            for difference in packed_rewards(model, batch.to(device)).view(-1, 2).diff(dim=1).squeeze(1)
        ]
