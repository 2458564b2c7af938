"""From rewards to an advantage for every token, for each kind of baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from minnow.objectives.advantages import (
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    whiten,
)
from minnow.objectives.policy import kl_divergence
from minnow.rl.algorithm import AlgorithmConfig, CriticConfig
from minnow.rl.rollouts import Trajectory

PerToken = list[np.ndarray]
"""One float32 array a trajectory, one number a trained token."""


@dataclass
class PhaseScores:
    """What was computed about a phase's trajectories."""

    old: PerToken
    """Log-probabilities under the policy that played."""
    ref: PerToken | None
    """Log-probabilities under the reference model."""
    penalties: PerToken
    """KL penalty of each token, to be taken off the reward."""
    values: PerToken = field(default_factory=list)
    """The critic's values."""
    advantages: PerToken = field(default_factory=list)
    returns: PerToken = field(default_factory=list)
    """What the critic should have said."""


def kl_penalties(algorithm: AlgorithmConfig, old: PerToken, ref: PerToken | None) -> PerToken:
    """What each token is charged for its distance from the reference: kl_reward_coef times the estimate of the KL."""
    if ref is None or not algorithm.kl_reward_coef:
        return [np.zeros_like(logprobs) for logprobs in old]
    estimates = (
        kl_divergence(torch.from_numpy(o), torch.from_numpy(r), algorithm.kl_reward_estimator).numpy()
        for o, r in zip(old, ref, strict=True)
    )
    return [algorithm.kl_reward_coef * estimate for estimate in estimates]


def advantages_of(
    algorithm: AlgorithmConfig,
    trajectories: Sequence[Trajectory],
    scores: PhaseScores,
    baseline: np.ndarray | None,
) -> tuple[PerToken, PerToken]:
    """Advantages and returns of every trained token.

    baseline: with `tracker`, the expected reward of each trajectory's prompt. Groups lie together, equal in size. What
    was left out has advantage 0 and counts in no mean and no deviation.
    """
    judged = torch.tensor([t.left_out is None for t in trajectories])
    if algorithm.advantage == "gae":
        return _critic_advantages(algorithm.critic, trajectories, scores, judged)
    if algorithm.advantage == "batch":
        return _batch_advantages(trajectories, scores, judged), []
    rewards = torch.tensor(
        [t.reward - float(p.sum()) for t, p in zip(trajectories, scores.penalties, strict=True)], dtype=torch.float64
    )
    whole = torch.zeros_like(rewards)
    if algorithm.advantage == "tracker":
        assert baseline is not None
        whole[judged] = whiten((rewards - torch.from_numpy(baseline))[judged])
    else:
        K = len(trajectories) // (trajectories[-1].group + 1)
        for group in torch.arange(len(trajectories)).split(K):
            whole[group[judged[group]]] = _group(algorithm, rewards[group[judged[group]]])
    spread = [np.full(t.num_trained, float(a), np.float32) for t, a in zip(trajectories, whole, strict=True)]
    return spread, []


def _group(algorithm: AlgorithmConfig, rewards_N: torch.Tensor) -> torch.Tensor:
    """Advantages of the answers to one prompt, [N]; of a single one there is nothing to say."""
    if len(rewards_N) < 2:
        return torch.zeros_like(rewards_N)
    rewards_GK = rewards_N.unsqueeze(0)
    if algorithm.advantage == "leave_one_out":
        return leave_one_out_advantages(rewards_GK)[0]
    return group_advantages(rewards_GK, scale=algorithm.advantage == "group")[0]


def _batch_advantages(trajectories: Sequence[Trajectory], scores: PhaseScores, judged_S: torch.Tensor) -> PerToken:
    """REINFORCE++ (arXiv 2501.03262, equations 8 and 10): the reward less the KL penalties from a token on,

        A_t = r - sum_{i >= t} penalty_i,

    whitened over all trained tokens.
    """
    lengths = [t.num_trained for t in trajectories]
    to_come = (torch.from_numpy(penalties).double().flip(0).cumsum(0).flip(0) for penalties in scores.penalties)
    worth_N = torch.cat([t.reward - charged for t, charged in zip(trajectories, to_come, strict=True)])
    counted_N = judged_S.repeat_interleave(torch.tensor(lengths))
    advantages_N = torch.zeros_like(worth_N)
    advantages_N[counted_N] = whiten(worth_N[counted_N])
    return [part.float().numpy() for part in advantages_N.split(lengths)]


def _critic_advantages(
    config: CriticConfig, trajectories: Sequence[Trajectory], scores: PhaseScores, judged_S: torch.Tensor
) -> tuple[PerToken, PerToken]:
    """GAE, whitened over all trained tokens; the reward comes with the last one, KL penalties with each."""
    S, L = len(trajectories), max(t.num_trained for t in trajectories)
    rewards_SL, values_SL = torch.zeros(S, L, dtype=torch.float64), torch.zeros(S, L, dtype=torch.float64)
    lengths_S = torch.tensor([t.num_trained for t in trajectories])
    bootstrap_S = torch.zeros(S, dtype=torch.float64)
    for s, trajectory in enumerate(trajectories):
        length = trajectory.num_trained
        rewards_SL[s, :length] = -torch.from_numpy(scores.penalties[s]).double()
        rewards_SL[s, length - 1] += trajectory.reward
        values_SL[s, :length] = torch.from_numpy(scores.values[s]).double()
        # A cut-off answer might have gone on: its last value stands for what was to come (bug B9 leaves it at 0).
        bootstrap_S[s] = float(scores.values[s][-1]) if trajectory.ending == "length" else 0.0
    advantages_SL, returns_SL = generalized_advantages(
        rewards_SL, values_SL, lengths_S, bootstrap_S, gamma=config.gamma, lam=config.lam
    )
    inside_SL = torch.arange(L) < lengths_S.unsqueeze(1)
    counted_SL = inside_SL & judged_S.unsqueeze(1)
    advantages_SL[counted_SL] = whiten(advantages_SL[counted_SL])
    advantages_SL[~judged_S] = 0.0
    return (
        [row[:n].float().numpy() for row, n in zip(advantages_SL, lengths_S, strict=True)],
        [row[:n].float().numpy() for row, n in zip(returns_SL, lengths_S, strict=True)],
    )
