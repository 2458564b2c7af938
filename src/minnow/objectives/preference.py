"""Preference losses: pure functions of the log-probabilities of a better (chosen) and a worse (rejected) answer.

All but KTO are one shape: a margin between the two answers, and a function that wants it large.

| loss   | margin d, chosen minus rejected       | per pair                                              |
|--------|---------------------------------------|-------------------------------------------------------|
| dpo    | log-ratio to the reference            | -log sigmoid(beta d)                                  |
| robust | the same                              | dpo, unbiased where labels are flipped                |
| hinge  | the same                              | max(0, 1 - beta d)                                    |
| ipo    | the same per token                    | (d - 1 / (2 beta))^2                                  |
| simpo  | log-probability per token             | -log sigmoid(beta d - gamma)                          |
| orpo   | log-odds of the probability per token | -beta log sigmoid(d), plus the chosen answer's loss   |

Notation: P pairs, N answer tokens of all 2P answers in order (chosen, rejected, chosen, ...). Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minnow.config import UserError, refuse_unused
from minnow.objectives.stable import log1mexp

LossName = Literal["dpo", "robust", "hinge", "ipo", "simpo", "orpo", "kto"]

WITHOUT_REFERENCE = ("simpo", "orpo")
AVERAGED = ("ipo", "simpo", "orpo")
ONLY_OF = {
    "label_smoothing": ("dpo", "robust", "simpo"),
    "length_alpha": ("dpo", "robust", "hinge", "ipo", "simpo", "orpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Settings that only some losses have."""


@dataclass(frozen=True, kw_only=True)
class PreferenceLossConfig:
    """Which preference loss, and its numbers."""

    name: LossName = "dpo"
    """dpo (Rafailov 2023), ipo (Azar 2023), hinge (Zhao 2023, SLiC), robust (Chowdhury 2024), simpo (Meng 2024), orpo
    (Hong 2024), kto (Ethayarajh 2024: each answer judged alone). simpo and orpo need no reference model."""
    beta: float | None = None
    """How closely to stay with the reference: greater is closer (orpo: its lambda). null: 2 for simpo, which has no
    reference and is content with a margin of simpo_gamma / beta nats a token; 0.1 for the others."""
    average: bool = False
    """Log-probabilities per token instead of sums, so that long answers do not count more; ipo, simpo, orpo always."""
    label_smoothing: float = 0.0
    """Share of pairs believed to be labelled the wrong way round, from 0 to below 0.5. For dpo and simpo this is cDPO's
    conservative loss; robust corrects for it without bias."""
    length_alpha: float = 1.0
    """Weight of an answer's tokens beyond the other answer's length: below 1, length itself earns less (LD-DPO)."""
    simpo_gamma: float = 1.0
    """simpo: the margin to reach, in nats after beta."""
    nll_weight: float | None = None
    """Weight of the chosen answer's own loss, the plain mean over its tokens (RPO, Pang 2024), which keeps it likely.
    null: 1 for orpo, 0 for the others."""
    desirable_weight: float = 1.0
    """kto: weight of chosen answers."""
    undesirable_weight: float = 1.0
    """kto: weight of rejected answers."""

    def __post_init__(self) -> None:
        if not self.chosen_beta > 0:
            raise UserError(f"loss.beta is {self.beta}: it must be positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"loss.label_smoothing is {self.label_smoothing}: it must lie from 0 to below 0.5")
        if not 0 <= self.length_alpha <= 1:
            raise UserError(f"loss.length_alpha is {self.length_alpha}: it must lie from 0 to 1")
        for key in ("nll_weight", "desirable_weight", "undesirable_weight"):
            if not (getattr(self, key) or 0) >= 0:
                raise UserError(f"loss.{key} is {getattr(self, key)}: it must be at least 0, or the model unlearns")
        if self.average and self.name == "kto":
            raise UserError("loss.average has no meaning for kto: its reference point is in nats per answer")
        others = {key: " or ".join(losses) for key, losses in ONLY_OF.items() if self.name not in losses}
        refuse_unused(self, {key: f"the loss is {self.name}, not {of}" for key, of in others.items()}, "loss.")

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities under the reference model enter the loss."""
        return self.name not in WITHOUT_REFERENCE

    @property
    def averages(self) -> bool:
        """Whether log-probabilities count per token."""
        return self.average or self.name in AVERAGED

    @property
    def chosen_beta(self) -> float:
        """`beta`, or its default."""
        if self.beta is not None:
            return self.beta
        return 2.0 if self.name == "simpo" else 0.1

    @property
    def chosen_nll_weight(self) -> float:
        """Weight of the chosen answer's own loss."""
        if self.nll_weight is not None:
            return self.nll_weight
        return 1.0 if self.name == "orpo" else 0.0


def length_weights(answer_N: Tensor, num_answers: int, alpha: float) -> Tensor:
    """Weights of LD-DPO (Liu et al. 2024, arXiv 2409.06411): 1 up to the shorter answer's length, `alpha` beyond.

    answer_N: int64 [N], ascending, the answer each token belongs to; answers 2p and 2p + 1 are a pair.
    Returns float32 [N].
    """
    lengths_A = torch.bincount(answer_N, minlength=num_answers)
    starts_A = lengths_A.cumsum(0) - lengths_A
    place_N = torch.arange(len(answer_N), device=answer_N.device) - starts_A[answer_N]
    shared_A = lengths_A.view(-1, 2).amin(1).repeat_interleave(2)
    return torch.where(place_N < shared_A[answer_N], 1.0, alpha)


def answer_sums(values_N: Tensor, answer_N: Tensor, num_answers: int) -> Tensor:
    """Sum token values by answer: float [N] -> [num_answers]."""
    return values_N.new_zeros(num_answers).index_add_(0, answer_N, values_N)


def dpo_loss(margins_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), [P] (DPO, arXiv 2305.18290; e: cDPO, Mitchell 2023)."""
    scaled_P = beta * margins_P
    return -(1 - label_smoothing) * F.logsigmoid(scaled_P) - label_smoothing * F.logsigmoid(-scaled_P)


def robust_loss(margins_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2e), [P] (robust DPO, arXiv 2403.00409).

    With a share e of labels flipped its expectation is DPO's loss on the clean labels.
    """
    scaled_P = beta * margins_P
    clean_P, flipped_P = F.logsigmoid(scaled_P), F.logsigmoid(-scaled_P)
    return (-(1 - label_smoothing) * clean_P + label_smoothing * flipped_P) / (1 - 2 * label_smoothing)


def hinge_loss(margins_P: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta d), [P] (SLiC-HF, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return F.relu(1 - beta * margins_P)


def ipo_loss(margins_P: Tensor, beta: float) -> Tensor:
    """(d - 1 / (2 beta))^2, [P], d per token (IPO, arXiv 2310.12036, equation 17): a margin to hit, not to outgrow."""
    return (margins_P - 1 / (2 * beta)).square()


def simpo_loss(margins_P: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta d - gamma), [P], d of log-probabilities per token (SimPO, arXiv 2405.14734)."""
    return dpo_loss(margins_P - gamma / beta, beta, label_smoothing)


def odds_ratio_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """-beta log sigmoid(log odds(chosen) - log odds(rejected)), [P] (ORPO, arXiv 2403.07691, equations 4 and 7).

    chosen_P, rejected_P: log p = log-probability per token, at most 0; log odds = log p - log(1 - p).
    """
    log_odds_P = chosen_P - rejected_P - (log1mexp(chosen_P) - log1mexp(rejected_P))
    return -beta * F.logsigmoid(log_odds_P)


def kto_loss(ratios_A: Tensor, desirable_A: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """KTO (arXiv 2402.01306, equation 7): each answer alone against the drift that any answer has, [A].

    desirable: w_d (1 - sigmoid(beta (r - kl))); undesirable: w_u (1 - sigmoid(beta (kl - r))).

    ratios_A: log-probability minus the reference's, per answer. desirable_A: bool. kl: () how far the model has moved
    from the reference on unrelated answers, at least 0, without gradient. weights: (w_d, w_u).
    """
    kl = kl.detach().clamp(min=0)
    sign_A = torch.where(desirable_A, 1.0, -1.0)
    weight_A = torch.where(desirable_A, weights[0], weights[1])
    return weight_A * torch.sigmoid(-beta * sign_A * (ratios_A - kl))


def preference_loss(
    config: PreferenceLossConfig,
    logprobs_A: Tensor,
    reference_A: Tensor,
    lengths_A: Tensor,
    plain_A: Tensor,
    kl: Tensor | None = None,
) -> Tensor:
    """Loss of each pair, [P], from the (length-weighted) sums of answers' log-probabilities, [2P].

    logprobs_A: under the model, with gradient. reference_A: under the reference (zeros where the loss needs none).
    lengths_A: answer tokens. plain_A: `logprobs_A` without length weights; the chosen answer's own loss is their mean
    (RPO, arXiv 2404.19733, equation 1; ORPO, equation 6). kl: kto's reference point.
    """
    if config.name == "kto":
        assert kl is not None
        desirable_A = torch.arange(len(logprobs_A), device=logprobs_A.device) % 2 == 0
        weights = (config.desirable_weight, config.undesirable_weight)
        losses_P = kto_loss(logprobs_A - reference_A, desirable_A, kl, config.chosen_beta, weights).view(-1, 2).mean(1)
    else:
        scale_A = lengths_A.to(logprobs_A.dtype) if config.averages else torch.ones_like(logprobs_A)
        chosen_P, rejected_P = ((logprobs_A - reference_A) / scale_A).view(-1, 2).unbind(1)
        losses_P = _pairwise(config, chosen_P, rejected_P)
    if config.chosen_nll_weight:
        losses_P = losses_P - config.chosen_nll_weight * (plain_A / lengths_A)[::2]
    return losses_P


def _pairwise(config: PreferenceLossConfig, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    margins_P = chosen_P - rejected_P
    match config.name:
        case "dpo":
            return dpo_loss(margins_P, config.chosen_beta, config.label_smoothing)
        case "robust":
            return robust_loss(margins_P, config.chosen_beta, config.label_smoothing)
        case "hinge":
            return hinge_loss(margins_P, config.chosen_beta)
        case "ipo":
            return ipo_loss(margins_P, config.chosen_beta)
        case "simpo":
            return simpo_loss(margins_P, config.chosen_beta, config.simpo_gamma, config.label_smoothing)
        case _:
            return odds_ratio_loss(chosen_P, rejected_P, config.chosen_beta)
