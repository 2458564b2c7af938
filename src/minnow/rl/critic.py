"""PPO's critic: what a response is worth at each of its tokens, learnt beside the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minnow.data.batches import Batch
from minnow.model.attention import PackedAttention
from minnow.model.transformer import CausalLM
from minnow.objectives.policy import value_loss
from minnow.rl.algorithm import CriticConfig
from minnow.rl.experience import PackedTrajectories
from minnow.training.distribution import sum_over_ranks
from minnow.training.parallel import sum_gradients


class Critic(nn.Module):
    """A backbone of its own, usually a copy of the policy's, and a head of one number; float32 AdamW.

    The value of a token is read where it is predicted: before it is known. The head starts at zero, so the first values
    are 0 and say nothing. The backbone's final norm is applied once (a peer applied it twice: bug B9).
    """

    def __init__(self, backbone: CausalLM, config: CriticConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        head = backbone.head_weight
        self.head = nn.Parameter(torch.zeros(head.shape[1], dtype=torch.float32, device=head.device))
        trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def forward(self, batch: Batch) -> Tensor:
        """Values of the batch's trained tokens, [N] float32."""
        attention = PackedAttention(batch.cu_seqlens, batch.tokens_BT.device)
        hidden_BTD = self.backbone(batch.tokens_BT, batch.positions_BT, attention)
        return hidden_BTD[batch.weights_BT > 0].float() @ self.head

    @torch.no_grad()
    def values(self, packed: Sequence[PackedTrajectories], total: int) -> list[np.ndarray]:
        """Values of every trajectory's trained tokens, one float32 array each."""
        out = [np.zeros(0, np.float32)] * total
        for part in packed:
            part.split(self(part.batch.to(self.head.device)), out)
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
        device = self.head.device
        total = 0.0
        for part in packed:
            loss = value_loss(
                self(part.batch.to(device)),
                part.flat(old_values).to(device),
                part.flat(returns).to(device),
                self.config.value_clip,
            ).sum()
            (loss / tokens).backward()
            total += float(loss.detach())
        sum_gradients(self.parameters())
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum_over_ranks([total])[0] / tokens

    def training_state(self) -> dict[str, Any]:
        """Return weights and optimizer state, for a checkpoint."""
        return {"model": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
