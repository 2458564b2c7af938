"""Episodes of which nobody can say what they are worth: they teach nothing, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from minnow.config import UserError
from minnow.rl.rollouts import Trajectory

TOO_MANY = 0.9
"""Share of the episodes played at once above which a run has nothing to learn from, and stops."""
REMEDIES = {
    "environment": (
        "their environment took longer than rollout.environment_seconds: look into what hangs, raise the setting, or "
        "lower rollout.environment_threads if steps wait for each other"
    ),
    "answer": (
        "their answers could not be compared within rewards.maths_seconds: raise it, or use rewards.answer_kind number "
        "or text"
    ),
    "judge": "the judge gave no number from 0 to 10: ask for one in rewards.judge.instruction, or take another judge",
}


def settle(trajectories: Sequence[Trajectory], samples: int, whole: int) -> None:
    """Give each episode that was left out the mean of its group's others, so that means and contrast stay what the
    others say.

    In a group of which nothing is left it is the mean of all, and where nothing is left at all, 0. Their advantage is
    none either way: they are not trained on. trajectories: `samples` to each prompt, which lie together. whole:
    episodes of a whole phase. UserError where nearly all of at least half a phase were left out.
    """
    judged = [t for t in trajectories if t.left_out is None]
    lost = [t for t in trajectories if t.left_out is not None]
    if len(lost) >= TOO_MANY * len(trajectories) and 2 * len(trajectories) >= whole:
        reasons = sorted({str(t.left_out) for t in lost})
        raise UserError(
            f"stopped: {len(lost)} of {len(trajectories)} episodes were left out; "
            + "; ".join(REMEDIES[reason] for reason in reasons)
        )
    for first in range(0, len(trajectories), samples):
        group = trajectories[first : first + samples]
        others = [t for t in group if t.left_out is None] or judged
        for trajectory in group:
            if trajectory.left_out is None:
                continue
            # `statistics.mean` is exact: the mean of equal rewards is equal to them, and makes no contrast.
            trajectory.reward = mean(t.reward for t in others) if others else 0.0
            names = others[0].rewards if others else {}
            trajectory.rewards = {name: mean(t.rewards[name] for t in others) for name in names}


def left_out_figures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How many episodes were left out, by what failed."""
    names = {"environment_timeouts": "environment", "answer_timeouts": "answer", "judge_failures": "judge"}
    return {name: float(sum(t.left_out == reason for t in trajectories)) for name, reason in names.items()}
