"""What a phase looked like, in numbers; and the watch that ends a run which has collapsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minnow.config import UserError
from minnow.rl.advantages import PhaseScores
from minnow.rl.rollouts import Trajectory
from minnow.rl.text_rewards import repetition_reward


def phase_figures(trajectories: Sequence[Trajectory], scores: PhaseScores, samples: int) -> dict[str, float]:
    """Rewards, lengths, entropy, drift from the reference, mismatch with the sampler; means over the phase."""
    rewards = np.array([t.reward for t in trajectories])
    old = np.concatenate(scores.old)
    sampler = np.concatenate([np.array(t.sampler_logprobs) for t in trajectories])
    figures = {"reward": float(rewards.mean()), "reward_deviation": float(rewards.std())}
    for name in trajectories[0].rewards:
        figures[f"reward/{name}"] = float(np.mean([t.rewards[name] for t in trajectories]))
    right = np.array([t.rewards.get("answer", t.reward) > 0.5 for t in trajectories]).reshape(-1, samples)
    figures |= {
        "pass@1": float(right.mean()),
        f"pass@{samples}": float(right.any(axis=1).mean()),
        "length": float(np.mean([t.num_trained for t in trajectories])),
        "truncated": float(np.mean([t.ending == "length" for t in trajectories])),
        # Mean of -log p over drawn tokens: an unbiased estimate of the entropy where the sampler is the policy.
        "entropy": float(-old.mean()),
        "repetition": float(-np.mean([repetition_reward(t.written) for t in trajectories])),
        "sampler_mismatch": float(np.abs(old - sampler).mean()),
        "sampler_mismatch_max": float(np.abs(old - sampler).max()),
    }
    if scores.ref is not None:
        figures["kl_to_reference"] = float((old - np.concatenate(scores.ref)).mean())
    return figures


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run has collapsed and goes no further; each over `patience` phases in a row."""

    patience: int = 5
    """Phases in a row; 0 turns the watch off."""
    repetition: float = 0.5
    """Repetition (0 to 1) above which the answers are loops."""
    truncated: float = 0.95
    """Share of cut-off answers above which nothing ends any more."""
    entropy: float = 0.005
    """Nats a token below which nothing is tried out any more while answers are still wrong."""


class Watch:
    """Call it with each phase's figures; it raises CollapseError with what to change."""

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self.runs: dict[str, int] = {}

    def __call__(self, figures: dict[str, float]) -> None:
        """Look at one phase."""
        if not self.config.patience:
            return
        config = self.config
        signs = {
            "the answers repeat themselves": (
                figures["repetition"] > config.repetition,
                "give rewards.repetition a weight, raise the KL coefficient, or lower the learning rate",
            ),
            "nearly every answer is cut off": (
                figures["truncated"] > config.truncated,
                "raise rollout.max_tokens, give rewards.overlong a weight, or lower the learning rate",
            ),
            "the answers to each prompt all earn the same, so nothing is learnt": (
                figures["equal_groups"] == 1 and figures["pass@1"] < 1,  # where all is solved, nothing is wrong
                "mix in easier prompts, reward partial success, or teach the model more before",
            ),
            "the policy has stopped exploring": (
                figures["entropy"] < config.entropy and figures["pass@1"] < 0.9,
                "raise algorithm.loss.clip_high or rollout.temperature, or lower the learning rate",
            ),
        }
        for sign, (seen, remedy) in signs.items():
            self.runs[sign] = self.runs.get(sign, 0) + 1 if seen else 0
            if self.runs[sign] >= config.patience:
                raise CollapseError(
                    f"stopped: for {config.patience} phases {sign}. The checkpoints before it stand. What helps: "
                    f"{remedy}. watch.patience 0 turns this check off"
                )


class CollapseError(UserError):
    """The policy has collapsed; the message says how it shows and what to change."""
