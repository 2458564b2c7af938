"""Distillation: the student's next-token distribution is pulled towards the teacher's, some tokens at a time.

All functions take log-probabilities over the same K outcomes that sum to one: the whole vocabulary, or the teacher's k
most likely tokens and one outcome for all others (`top_k_outcomes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minnow.config import UserError, refuse_unused

DivergenceName = Literal["forward", "reverse", "jsd"]
TeacherChunk = Callable[[slice], tuple[Tensor, Tensor | None]]

CHUNK_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """How far a student is from a teacher."""

    temperature: float = 1.5
    """Both distributions are softened by it; the teacher's part counts its square, so gradients keep their size."""
    divergence: DivergenceName = "forward"
    """forward: KL(teacher, student), covers all the teacher says; reverse: KL(student, teacher), keeps to what the
    teacher is sure of; jsd: the generalised Jensen-Shannon divergence between them."""
    jsd_beta: float = 0.5
    """jsd: the teacher's share of the mixture; near 0 it acts like forward, near 1 like reverse."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"loss.temperature is {self.temperature}: it must be positive")
        if not 0 < self.jsd_beta < 1:
            raise UserError(f"loss.jsd_beta is {self.jsd_beta}: it must lie between 0 and 1 (else: forward or reverse)")
        if self.divergence != "jsd":
            refuse_unused(self, {"jsd_beta": f"the divergence is {self.divergence}, not jsd"}, "loss.")


@dataclass(frozen=True, kw_only=True)
class DistillationLossConfig(DivergenceConfig):
    """How a student learns from data beside a teacher."""

    alpha: float = 0.5
    """Weight of the data's own next token; the teacher has the rest."""
    top_k: int = 0
    """Ask the teacher once, before training, and keep its k most likely tokens at every position on disk; 0: the
    teacher runs beside the student and gives its whole distribution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < 1:
            raise UserError(f"loss.alpha is {self.alpha}: it must lie from 0 to below 1 (at 1 there is no teacher)")
        if self.top_k < 0:
            raise UserError(f"loss.top_k is {self.top_k}: it must be at least 0")


class DistillationLoss(NamedTuple):
    """Sums over tokens, each times its weight; 0-D float32."""

    loss_sum: Tensor
    """alpha x nll + (1 - alpha) T^2 x divergence: call backward on this one."""
    nll_sum: Tensor
    """Cross-entropy with the data's tokens, nats; without gradient."""
    divergence_sum: Tensor
    """Divergence from the teacher at the temperature, nats; without gradient."""


def divergence(student_NK: Tensor, teacher_NK: Tensor, name: DivergenceName, beta: float = 0.5) -> Tensor:
    """Divergence of log-probabilities, [N] nats.

    forward: sum_k t (log t - log s) (Hinton et al., arXiv 1503.02531); reverse: sum_k s (log s - log t) (MiniLLM, arXiv
    2306.08543); jsd: beta KL(t, m) + (1 - beta) KL(s, m) with m = beta t + (1 - beta) s (GKD, arXiv 2306.13649, eq. 1).
    """
    if name == "forward":
        return kl(teacher_NK, student_NK)
    if name == "reverse":
        return kl(student_NK, teacher_NK)
    mixture_NK = torch.logaddexp(teacher_NK + math.log(beta), student_NK + math.log1p(-beta))
    return beta * kl(teacher_NK, mixture_NK) + (1 - beta) * kl(student_NK, mixture_NK)


def kl(p_NK: Tensor, q_NK: Tensor) -> Tensor:
    """sum_k p (log p - log q) of log-probabilities, [N]."""
    return (p_NK.exp() * (p_NK - q_NK)).sum(1)


def top_k_outcomes(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-probabilities of the tokens `ids` and, last, of all others together: [N, K + 1].

    The others are added up: what the listed ones leave to one has no digits where they are nearly all. Where there are
    no others they count as the least number, since 0 x infinity is none.
    """
    others_N1 = logprobs_NV.scatter(1, ids_NK, -math.inf).logsumexp(1, keepdim=True)
    least = math.log(torch.finfo(torch.float32).tiny)
    return torch.cat([logprobs_NV.gather(1, ids_NK), others_N1.clamp(min=least)], dim=1)


def linear_distillation(
    config: DistillationLossConfig,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    teacher: TeacherChunk,
    *,
    vocab_size: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> DistillationLoss:
    """Sum the distillation loss over tokens, the student's head included.

    Shapes: hidden [N, D], weight [V, D], targets [N] int64, weights [N] float. teacher: gives, for a slice of the
    tokens, its log-probabilities at the temperature: (all [C, V], None), or of its k most likely tokens and, last, of
    all others, with the tokens' ids ([C, k + 1], [C, k]). Only one chunk's logits stand at a time, the student's and
    the teacher's: the backward pass computes them again. vocab_size: tokens that both know, where the heads are padded
    to different sizes.
    """
    sums = torch.zeros(3, dtype=torch.float32, device=hidden_ND.device)

    def chunk_sums(hidden_CD: Tensor, weight: Tensor, chunk: slice) -> Tensor:
        with torch.no_grad():
            teacher_CK, ids_CK = teacher(chunk)
        logits_CV = (hidden_CD @ weight.to(hidden_CD.dtype).T).float()
        nll_C = -torch.log_softmax(logits_CV, dim=1).gather(1, targets_N[chunk].unsqueeze(1)).squeeze(1)
        student_CK = torch.log_softmax(logits_CV[:, :vocab_size] / config.temperature, dim=1)
        if ids_CK is not None:
            student_CK = top_k_outcomes(student_CK, ids_CK)
        divergence_C = divergence(student_CK, teacher_CK, config.divergence, config.jsd_beta)
        loss_C = config.alpha * nll_C + (1 - config.alpha) * config.temperature**2 * divergence_C
        return (torch.stack([loss_C, nll_C, divergence_C]) * weights_N[chunk]).sum(1)

    for start in range(0, len(hidden_ND), chunk_size):
        chunk = slice(start, start + chunk_size)
        sums = sums + checkpoint(
            chunk_sums, hidden_ND[chunk], weight_VD, chunk, use_reentrant=False, preserve_rng_state=False
        )
    return DistillationLoss(sums[0], sums[1].detach(), sums[2].detach())
