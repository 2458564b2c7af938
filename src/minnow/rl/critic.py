"""PPO's critic: what a response is worth at each of its tokens, learnt beside the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minnow.config import UserError
from minnow.data.batches import Batch
from minnow.model.reward_model import RewardModel
from minnow.objectives.policy import value_loss
from minnow.rl.algorithm import CriticConfig
from minnow.rl.experience import PackedTrajectories
from minnow.training.distribution import sum_over_ranks
from minnow.training.forward import hidden_states
from minnow.training.loss_scale import LossScale
from minnow.training.parallel import sum_gradients


class Critic:
    """A reward model read at every token instead of the last one, with an AdamW of its own.

    The value of a token is read where it is predicted: before it is known. A fresh head is zero, so the first values
    are 0 and say nothing. The decoder's final norm is applied once (a peer applied it twice: bug B9). In fp16 it has a
    loss scale of its own, and an update that overflows is left out.
    """

    def __init__(self, model: RewardModel, config: CriticConfig) -> None:
        self.model, self.config = model, config
        self.loss_scale = LossScale(model.compute_dtype)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def _values(self, batch: Batch) -> Tensor:
        """Values of the batch's trained tokens, [N] float32."""
        hidden_BTD = hidden_states(self.model, batch)
        return self.model.rewards(hidden_BTD[batch.weights_BT > 0]).float()

    @torch.no_grad()
    def values(self, packed: Sequence[PackedTrajectories], total: int) -> list[np.ndarray]:
        """Values of every trajectory's trained tokens, one float32 array each."""
        out = [np.zeros(0, np.float32)] * total
        for part in packed:
            part.split(self._values(part.batch.to(self.model.score.weight.device)), out)
        return out

    def update(
        self,
        packed: Sequence[PackedTrajectories],
        old_values: Sequence[np.ndarray],
        returns: Sequence[np.ndarray],
        tokens: int,
    ) -> float:
        """One optimizer step on this process's share of some trajectories; the mean loss of a token before it.

        old_values, returns: of every trajectory of the phase, float32, one number a trained token. tokens: trained
        tokens of all processes together. UserError where the gradient is not finite and no loss scale is to blame.
        """
        device = self.model.score.weight.device
        total = 0.0
        for part in packed:
            loss = value_loss(
                self._values(part.batch.to(device)),
                part.flat(old_values).to(device),
                part.flat(returns).to(device),
                self.config.value_clip,
            ).sum()
            (loss * (self.loss_scale.scale / tokens)).backward()
            total += float(loss.detach())
        sum_gradients(self.model.parameters())
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(grads, 1 / self.loss_scale.scale)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        finite = math.isfinite(norm)
        if not finite and not self.loss_scale.helps:
            raise UserError(
                f"the critic's gradient norm is {norm}; its weights were left as they were before this update. Look at "
                "the rewards in rollouts.jsonl, or lower algorithm.critic.learning_rate"
            )
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale.update(overflow=not finite)
        return sum_over_ranks([total])[0] / tokens

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimizer state, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss_scale.load_state_dict(state["loss_scale"])
