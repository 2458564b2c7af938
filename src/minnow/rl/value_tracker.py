"""SPO's value tracker: what reward each prompt is worth, remembered over the whole run instead of a group's mean.

Single-stream Policy Optimization, arXiv 2509.13232. A prompt needs one answer a step, not a group: its baseline is the
mean of a Beta distribution over its success, updated after every answer and forgetting faster when the policy moves
faster.
"""

from __future__ import annotations

import numpy as np

from minnow.config import UserError

RHO_MIN, RHO_MAX = 0.875, 0.96
"""Bounds of the forgetting factor; 1 / (1 - RHO_MIN) = 8 answers is the tracker's shortest memory."""
KL_HALF_LIFE = 0.06
"""Mean absolute change of the log-probability that halves what the tracker remembers."""
EXPLORATION = 0.05
"""Added to every prompt's sampling weight, so that none is forgotten."""


class ValueTracker:
    """Beta(alpha, beta) for each of P prompts; rewards from 0 to 1."""

    def __init__(self, num_prompts: int) -> None:
        self.alpha_P = np.full(num_prompts, 0.5)
        self.beta_P = np.full(num_prompts, 0.5)

    def seed(self, prompt: int, rewards: np.ndarray) -> None:
        """Start a prompt from n0 answers of the untrained policy, worth 1 / (1 - RHO_MIN) = 8 observations (as the
        authors' code does; the halves keep a prompt that is always or never solved from being certain):

        alpha = 8 (sum r + 1/2) / (n0 + 1),   beta = 8 (n0 - sum r + 1/2) / (n0 + 1)

        rewards: float [n0]; UserError for one outside of 0 to 1.
        """
        _check(rewards)
        worth, n0 = 1 / (1 - RHO_MIN), len(rewards)
        self.alpha_P[prompt] = worth * (rewards.sum() + 0.5) / (n0 + 1)
        self.beta_P[prompt] = worth * (n0 - rewards.sum() + 0.5) / (n0 + 1)

    def values(self, prompts: np.ndarray) -> np.ndarray:
        """Expected reward of each of `prompts` (int64 [N]), alpha / (alpha + beta), [N]: read *before* the update."""
        return self.alpha_P[prompts] / (self.alpha_P[prompts] + self.beta_P[prompts])

    def update(self, prompts: np.ndarray, rewards: np.ndarray, drift: np.ndarray) -> None:
        """Take in one answer for each of `prompts`, int64 [N]. UserError for a reward outside of 0 to 1.

        drift: mean |log pi_now - log pi_then| over the tokens of the prompt's *previous* answer; 0 for its first.
        rho = clip(2^(-drift / 0.06), 0.875, 0.96);  alpha <- rho alpha + r;  beta <- rho beta + 1 - r.
        """
        _check(rewards)
        rho = np.clip(2.0 ** (-drift / KL_HALF_LIFE), RHO_MIN, RHO_MAX)
        for prompt, reward, keep in zip(prompts, rewards, rho, strict=True):  # a prompt may come twice
            self.alpha_P[prompt] = keep * self.alpha_P[prompt] + reward
            self.beta_P[prompt] = keep * self.beta_P[prompt] + 1 - reward

    def sampling_weights(self) -> np.ndarray:
        """How much each prompt is worth asking, [P]: sqrt(v (1 - v)) + 0.05, largest where the outcome is open."""
        values_P = self.values(np.arange(len(self.alpha_P)))
        return np.sqrt(values_P * (1 - values_P)) + EXPLORATION

    def state_dict(self) -> dict[str, list[float]]:
        """Return what a checkpoint keeps."""
        return {"alpha": self.alpha_P.tolist(), "beta": self.beta_P.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go back to a checkpoint."""
        self.alpha_P, self.beta_P = np.array(state["alpha"]), np.array(state["beta"])


def _check(rewards: np.ndarray) -> None:
    outside = rewards[(rewards < 0) | (rewards > 1)]
    if len(outside):
        raise UserError(
            f"SPO and algorithm.curriculum need rewards from 0 to 1, but one is {outside[0]:g}: make the rewards' "
            "weights sum to 1, without rewards.overlong and rewards.repetition, which go below 0"
        )
