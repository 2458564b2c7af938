# ruff: noqa: N815 (fields carry their shape)
"""Policy optimisation as one formula: ratio term x advantage - KL term.

PPO, GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++ and SPO differ in three choices and in how tokens are added
up. Here are the choices, as pure functions. There is no padding: a batch's trained tokens are one flat row [N], and
`sequence_N` says which response each belongs to. A token of the prompt, or one that a tool wrote, is simply not among
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minnow.config import UserError, refuse_unused

RatioLevel = Literal["token", "sequence_mean", "sequence_sum"]
Surrogate = Literal["clip", "cispo", "none"]
KLEstimator = Literal["k1", "k2", "k3", "k3_straight_through"]
Aggregation = Literal["token", "sequence", "constant"]

_MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond it only overflow is won


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """The ratio term, how tokens are added up, and the KL term when it is a loss."""

    surrogate: Surrogate = "clip"
    """clip: PPO's pessimistic clipped ratio; cispo: a capped ratio without gradient times the log-probability; none:
    plain REINFORCE, no ratio."""
    ratio: RatioLevel = "token"
    """Whose probability ratio: token (PPO, GRPO), sequence_mean (GSPO: geometric mean over the response's tokens) or
    sequence_sum (RLOO: of the whole response)."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high; larger than clip_low lets rare tokens grow (DAPO's clip-higher)."""
    dual_clip: float | None = None
    """For negative advantages the loss is at most this many times their size (above 1; usually 3). null: no bound."""
    aggregation: Aggregation = "token"
    """token: every token counts the same (DAPO); sequence: every response the same, its tokens averaged (GRPO);
    constant: a response's sum divided by a fixed length (Dr. GRPO)."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the reference model, as a term of the loss; 0 needs no reference."""
    kl_estimator: KLEstimator = "k3"
    """k1 (with kl_ratio only), k2, k3 (Schulman), or k3_straight_through: k3's value with k2's gradient, which is the
    right one."""
    kl_ratio: bool = False
    """Multiply the estimate by the token's ratio: its gradient is then that of the KL divergence also where the policy
    has left the one that played (DeepSeek-V3.2, for k3)."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise UserError(f"clip_low is {self.clip_low}: it must be from 0 to 1")
        if self.clip_high < 0:
            raise UserError(f"clip_high is {self.clip_high}: it must not be negative")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip is {self.dual_clip}: it must be above 1 (usually 3), or null")
        if self.kl_coef < 0:
            raise UserError(f"kl_coef is {self.kl_coef}: it must not be negative")
        if self.kl_coef and self.kl_estimator == "k1" and not self.kl_ratio:
            raise UserError(
                "kl_estimator k1 as a loss has no gradient on average: take k3_straight_through, set kl_ratio, or put "
                "the KL divergence into the reward (kl_reward_coef)"
            )
        refuse_unused(self, self._unused(), "algorithm.loss.")

    def _unused(self) -> dict[str, str]:
        """Settings of what was not chosen."""
        clips = ("clip_low", "clip_high", "dual_clip")
        unread = {"clip": (), "cispo": ("clip_low", "dual_clip"), "none": ("ratio", *clips)}
        unused = dict.fromkeys(unread[self.surrogate], f"the surrogate is {self.surrogate}, which does not read it")
        if not self.kl_coef:
            unused |= dict.fromkeys(("kl_estimator", "kl_ratio"), "algorithm.loss.kl_coef is 0")
        return unused


class PolicyLoss(NamedTuple):
    """Per-token results, [N] in the log-probabilities' dtype. Sum them with `token_weights`."""

    loss_N: Tensor
    """What to minimise, KL term included."""
    kl_N: Tensor
    """The estimate of the KL divergence to the reference (zeros without one); without gradient."""
    clipped_N: Tensor
    """1.0 where the ratio was clipped, and with that the gradient taken away; with cispo, where it was capped: the
    gradient goes on with the cap for its weight."""
    log_ratio_N: Tensor
    """log pi - log pi_old of each token; without gradient."""


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    sequence_N: Tensor,
    config: PolicyLossConfig,
    ref_logprobs_N: Tensor | None = None,
    correction_N: Tensor | None = None,
) -> PolicyLoss:
    """Per-token loss of one micro-batch. Sequences must be whole in it when the ratio is a sequence's.

    With r = pi/pi_old (of the token, or of its sequence) and A the advantage:

        clip   -min(r A, clip(r, 1-e_low, 1+e_high) A)             (PPO, arXiv 1707.06347, eq. 7)
               and for A < 0 at most -c A                          (dual clip, arXiv 1912.09729, eq. 5)
        cispo  -stop_gradient(min(r, 1+e_high)) A log pi           (MiniMax-M1, arXiv 2506.13585, eq. 4)
        none   -A log pi                                           (REINFORCE)

    GSPO's ratio is exp(mean_t log r_t) (arXiv 2507.18071, eq. 7), RLOO's exp(sum_t log r_t) (arXiv 2402.14740).

    correction_N: truncated importance weights between the trainer's and the sampler's probabilities, without gradient
    (`sampler_correction`); they multiply the ratio term, not the KL term.
    """
    token_log_ratio_N = logprobs_N - old_logprobs_N
    log_ratio_N = _level(token_log_ratio_N, sequence_N, config.ratio).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_N = log_ratio_N.exp()
    clipped_N = torch.zeros_like(ratio_N)
    if config.surrogate == "clip":
        limited_N = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
        loss_N = -torch.minimum(ratio_N * advantages_N, limited_N * advantages_N)
        clipped_N = (limited_N * advantages_N < ratio_N * advantages_N).to(ratio_N.dtype)
        if config.dual_clip is not None:
            bound_N = -config.dual_clip * advantages_N
            beyond_N = (advantages_N < 0) & (loss_N > bound_N)
            loss_N = torch.where(beyond_N, bound_N, loss_N)
            clipped_N = torch.where(beyond_N, torch.ones_like(clipped_N), clipped_N)
    elif config.surrogate == "cispo":
        capped_N = ratio_N.detach().clamp(max=1 + config.clip_high)
        loss_N = -capped_N * advantages_N * logprobs_N
        clipped_N = (ratio_N.detach() > capped_N).to(ratio_N.dtype)
    else:
        loss_N = -advantages_N * logprobs_N
    if correction_N is not None:
        loss_N = loss_N * correction_N
    kl_N = torch.zeros_like(loss_N)
    if ref_logprobs_N is not None:
        kl_N = kl_divergence(logprobs_N, ref_logprobs_N, config.kl_estimator)
        if config.kl_ratio:
            token_ratio_N = token_log_ratio_N.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
            # k1 and k3 want the ratio's gradient beside their own; k2's is the KL's without it.
            with_own_gradient = config.kl_estimator in ("k2", "k3_straight_through")
            kl_N = kl_N * (token_ratio_N.detach() if with_own_gradient else token_ratio_N)
        loss_N = loss_N + config.kl_coef * kl_N
    return PolicyLoss(loss_N, kl_N.detach(), clipped_N.detach(), token_log_ratio_N.detach())


def kl_divergence(logprobs_N: Tensor, ref_logprobs_N: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(pi || pi_ref) at each sampled token; x = log pi - log pi_ref.

        k1 = x      k2 = x^2 / 2      k3 = exp(-x) + x - 1

    (J. Schulman, "Approximating KL divergence", 2020.) All are unbiased or nearly so as *values* on samples of pi. As a
    *loss*, only k2's gradient is the KL's: k1's is zero on average, k3's is that of KL(pi_ref || pi).
    `k3_straight_through` has k3's low-variance value and k2's gradient. Times the ratio (`kl_ratio`) each has the KL's.
    """
    x_N = logprobs_N - ref_logprobs_N
    if estimator == "k1":
        return x_N
    if estimator == "k2":
        return x_N.square() / 2
    x_N = x_N.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    k3_N = torch.expm1(-x_N) + x_N
    if estimator == "k3":
        return k3_N
    k2_N = x_N.square() / 2
    return k2_N + (k3_N - k2_N).detach()


def token_weights(
    sequence_N: Tensor, num_sequences: int, aggregation: Aggregation, *, constant_length: int = 1
) -> Tensor:
    """Weight of each token, [N] float32, so that the loss is sum_N(weight x loss) / count over the global batch.

        token     1                    count: trained tokens
        sequence  1 / its length       count: responses
        constant  1 / constant_length  count: responses

    `aggregation_count` gives the count of a micro-batch; the Trainer adds it up before dividing, so the split into
    micro-batches and ranks changes nothing. Dividing by a micro-batch's own tokens (TRL's `bnpo`) would depend on it.
    """
    if aggregation == "token":
        return torch.ones(len(sequence_N), device=sequence_N.device)
    if aggregation == "constant":
        return torch.full((len(sequence_N),), 1 / constant_length, device=sequence_N.device)
    lengths_S = torch.bincount(sequence_N, minlength=num_sequences)
    return 1 / lengths_S[sequence_N].float()


def aggregation_count(num_tokens: int, num_sequences: int, aggregation: Aggregation) -> float:
    """What `token_weights`' sum is divided by: a micro-batch's trained tokens or responses, to be added up over all."""
    return float(num_tokens if aggregation == "token" else num_sequences)


def sampler_correction(
    trainer_logprobs_N: Tensor, sampler_logprobs_N: Tensor, sequence_N: Tensor, level: RatioLevel, cap: float
) -> Tensor:
    """Truncated importance weights min(pi_trainer / pi_sampler, cap), [N], for tokens that another distribution drew.

    The sampler is not quite the policy: it may have cut the tail (top-p), run in another precision, or be some steps
    behind. (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025.)
    """
    log_ratio_N = _level(trainer_logprobs_N - sampler_logprobs_N, sequence_N, level)
    return log_ratio_N.exp().clamp(max=cap)


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of the critic, the larger of the plain one and that of a value kept near the old one:

        0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

    [N]. (OpenAI baselines' PPO2.) clip None: the plain one.
    """
    plain_N = (values_N - returns_N).square()
    if clip is None:
        return plain_N / 2
    near_N = torch.clamp(values_N, old_values_N - clip, old_values_N + clip)
    return torch.maximum(plain_N, (near_N - returns_N).square()) / 2


def _level(token_log_ratio_N: Tensor, sequence_N: Tensor, level: RatioLevel) -> Tensor:
    """Log-ratio of the token, or of its sequence (mean or sum), for each token."""
    if level == "token" or len(sequence_N) == 0:
        return token_log_ratio_N
    num_sequences = int(sequence_N.max()) + 1
    sums_S = token_log_ratio_N.new_zeros(num_sequences).index_add(0, sequence_N, token_log_ratio_N)
    if level == "sequence_mean":
        sums_S = sums_S / torch.bincount(sequence_N, minlength=num_sequences).clamp(min=1)
    return sums_S[sequence_N]
