"""Losses that keep the experts of a mixture evenly loaded, from what the routers decided.

The gradient of a loss over a global batch reaches a router's probabilities p [N, E] through their sum over tokens only,
with a slope for each expert that all tokens share. So a micro-batch has the part `(slope_E * p.sum(0)).sum()`, and they
add up to the same gradient however the batch is cut.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expert_counts(experts_Nk: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen: [N, k] int64 -> [E] int64."""
    experts_A = experts_Nk.flatten()
    return experts_A.new_zeros(num_experts).index_add_(0, experts_A, torch.ones_like(experts_A))


def load_balance_loss(counts_E: Tensor, probability_sums_E: Tensor) -> Tensor:
    """E sum_e f_e P_e with f the shares of choices and P the mean probabilities; 1 when even, E at the worst.

    Switch Transformer (2101.03961), equations 4 to 6, for k choices a token: f_e = counts_e / sum of counts. Both
    [..., E], float; leading dimensions are kept.
    """
    shares_E = counts_E / counts_E.sum(-1, keepdim=True)
    means_E = probability_sums_E / probability_sums_E.sum(-1, keepdim=True)
    return counts_E.shape[-1] * (shares_E * means_E).sum(-1)


def load_balance_slope(counts_E: Tensor) -> Tensor:
    """Gradient of `load_balance_loss` by the mean probabilities: E f_e (the choices have none); [..., E], float."""
    return counts_E.shape[-1] * counts_E / counts_E.sum(-1, keepdim=True)


def kl_to_uniform(probability_sums_E: Tensor) -> Tensor:
    """KL(U || P) = sum_e 1/E (log 1/E - log P_e) of the mean probabilities P; 0 when even.

    mini-llm takes P over the sparse weights of the chosen experts; here it is over the softmax of all, which gives an
    expert that nobody chose a gradient.
    """
    means_E = probability_sums_E / probability_sums_E.sum(-1, keepdim=True)
    return -means_E.log().mean(-1) - math.log(means_E.shape[-1])


def kl_to_uniform_slope(probability_sums_E: Tensor) -> Tensor:
    """Gradient of `kl_to_uniform` with respect to the mean probabilities: -1 / (E P_e)."""
    means_E = probability_sums_E / probability_sums_E.sum(-1, keepdim=True)
    return -1 / (means_E.shape[-1] * means_E)


def sequence_balance_sum(probabilities_NE: Tensor, experts_Nk: Tensor, pieces_N: Tensor) -> Tensor:
    """Sum over documents of their tokens times their load-balance loss; divide by the tokens of the global batch.

    The complementary sequence-wise loss of DeepSeek-V3 (2412.19437, equations 17 to 20): for a document of T tokens,
    sum_e f_e P_e with f_e = E / (k T) * choices of e, and P_e its mean probability. The paper's documents are of one
    length; here each counts by its tokens. pieces_N (int64): the document of each token, numbered from 0, each N > 0.
    """
    num_experts = probabilities_NE.shape[1]
    num_pieces = int(pieces_N.max()) + 1 if len(pieces_N) else 0
    choices_NE = torch.zeros_like(probabilities_NE).scatter_(1, experts_Nk, 1.0)
    lengths_P = torch.zeros(num_pieces, dtype=torch.float32, device=pieces_N.device)
    lengths_P.index_add_(0, pieces_N, torch.ones_like(pieces_N, dtype=torch.float32))
    zeros_PE = probabilities_NE.new_zeros(num_pieces, num_experts)
    choices_PE = zeros_PE.index_add(0, pieces_N, choices_NE)
    sums_PE = zeros_PE.index_add(0, pieces_N, probabilities_NE)
    losses_P = num_experts / experts_Nk.shape[1] * (choices_PE * sums_PE).sum(1) / lengths_P.clamp(min=1)
    return losses_P.sum()


def bias_step(counts_E: Tensor) -> Tensor:
    """Direction of the selection bias: +1 for an expert chosen less often than the mean, -1 for one chosen more often.

    Balancing without an auxiliary loss (2408.15664, algorithm 1; DeepSeek-V3). [..., E] float in and out.
    """
    return (counts_E.mean(-1, keepdim=True) - counts_E).sign()
