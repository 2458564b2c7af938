"""PPO's critic: what a response is worth at each of its tokens, learnt beside the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minnow.data.batches import Batch
from minnow.model.attention import PackedAttention
from minnow.model.reward_model import RewardModel
from minnow.objectives.policy import value_loss
from minnow.rl.algorithm import CriticConfig
from minnow.rl.experience import PackedTrajectories
from minnow.training.distribution import sum_over_ranks
from minnow.training.parallel import sum_gradients


class Critic:
    """A reward model read at every token instead of the last one, with an AdamW of its own.

    The value of a token is read where it is predicted: before it is known. A fresh head is zero, so the first values
    are 0 and say nothing. The decoder's final norm is applied once (a peer applied it twice: bug B9).
    """

    def __init__(self, model: RewardModel, config: CriticConfig) -> None:
        self.model, self.config = model, config
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def _values(self, batch: Batch) -> Tensor:
        """Values of the batch's trained tokens, [N] float32."""
        attention = PackedAttention(batch.cu_seqlens, batch.tokens_BT.device)
        hidden_BTD = self.model(batch.tokens_BT, batch.positions_BT, attention)
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

        tokens: trained tokens of all processes together.
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
            (loss / tokens).backward()
            total += float(loss.detach())
        sum_gradients(self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum_over_ranks([total])[0] / tokens

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimizer state, for a checkpoint."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
