"""What a phase looked like, in numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minnow.rl.advantages import PhaseScores
from minnow.rl.left_out import left_out_figures
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
    figures |= pass_figures(trajectories, samples)
    figures |= {
        "length": float(np.mean([t.num_trained for t in trajectories])),
        "truncated": float(np.mean([t.ending == "length" for t in trajectories])),
        # Mean of -log p over drawn tokens: an unbiased estimate of the entropy where the sampler is the policy.
        "entropy": float(-old.mean()),
        "repetition": 0.0 - float(np.mean([repetition_reward(t.written, t.calls) for t in trajectories])),
        "sampler_mismatch": float(np.abs(old - sampler).mean()),
        "sampler_mismatch_max": float(np.abs(old - sampler).max()),
    }
    figures |= left_out_figures(trajectories) | thinking_figures(trajectories)
    if scores.ref is not None:
        figures["kl_to_reference"] = float((old - np.concatenate(scores.ref)).mean())
    return figures


def thinking_figures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Of a mixture: the share of the episodes that were to think, and the mean reward of both kinds."""
    thinking = [t.reward for t in trajectories if t.thinking]
    at_once = [t.reward for t in trajectories if not t.thinking]
    if not thinking or not at_once:
        return {}
    return {
        "thinking": len(thinking) / len(trajectories),
        "reward_thinking": float(np.mean(thinking)),
        "reward_at_once": float(np.mean(at_once)),
    }


def pass_figures(trajectories: Sequence[Trajectory], samples: int) -> dict[str, float]:
    """Share of the answers that are right, and of the prompts with a right one among `samples`, which lie together.

    Right is what the reward `answer` calls right; without it, a reward above one half. Each prompt weighs the same by
    its answers that were judged; without any it is left out, and where nothing at all was judged nothing is right.
    """
    right = np.array([t.rewards.get("answer", t.reward) > 0.5 for t in trajectories]).reshape(-1, samples)
    judged = np.array([t.left_out is None for t in trajectories]).reshape(-1, samples)
    right, judged = right[judged.any(axis=1)], judged[judged.any(axis=1)]
    if not len(judged):
        return {"pass@1": 0.0, f"pass@{samples}": 0.0}
    shares = (right & judged).sum(axis=1) / judged.sum(axis=1)
    return {"pass@1": float(shares.mean()), f"pass@{samples}": float((shares > 0).mean())}
