"""The loss of a reward model: pairs of a better and a worse answer as games, rewards as strengths (Bradley-Terry)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_P: Tensor, rejected_P: Tensor, margins_P: Tensor | float = 0.0, centering: float = 0.0
) -> Tensor:
    """-log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2, [P].

    The first term is the negative log-likelihood of the better answer winning (Bradley and Terry, 1952), by at least
    the margin m (Llama 2, arXiv 2307.09288, equation 2). Only differences of rewards matter to it; the second term
    keeps their mean at zero (arXiv 2312.09244).
    """
    losses_P = -F.logsigmoid(chosen_P - rejected_P - margins_P)
    if centering:
        losses_P = losses_P + centering * (chosen_P + rejected_P).square()
    return losses_P
