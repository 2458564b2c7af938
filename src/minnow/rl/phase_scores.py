"""Scoring a phase: log-probabilities under policy and reference, values, SPO's drift, and from them the advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minnow.data.batches import Share
from minnow.model.lora import adapters_off
from minnow.model.transformer import CausalLM
from minnow.rl.advantages import PhaseScores, advantages_of, kl_penalties
from minnow.rl.critic import Critic
from minnow.rl.experience import PackedTrajectories, score_trajectories
from minnow.rl.phase_experience import PhaseSettings, told_to_all
from minnow.rl.rollouts import Trajectory
from minnow.rl.value_tracker import ValueTracker


class PhaseScorer:
    """Scores phases, and remembers of each prompt the last answer: SPO asks how far the policy has moved on it."""

    def __init__(
        self,
        settings: PhaseSettings,
        policy: CausalLM,
        reference: CausalLM | None,
        critic: Critic | None,
        tracker: ValueTracker | None,
    ) -> None:
        """`reference` may be the policy itself if that has adapters: they are switched off for it."""
        self.settings, self.policy, self.reference, self.critic = settings, policy, reference, critic
        self.tracker = tracker if settings.algorithm.advantage == "tracker" else None
        self.previous: dict[int, tuple[list[int], list[bool], np.ndarray]] = {}
        """Ids, which of them the model wrote, and those' log-probabilities then."""

    def score(self, trajectories: Sequence[Trajectory], prompts: np.ndarray, share: Share) -> PhaseScores:
        """Log-probabilities, penalties, values and advantages. `prompts`: the number of each group's prompt."""
        old = self._under(self.policy, trajectories, share)
        ref = None
        if self.reference is not None:
            with adapters_off(self.reference):
                ref = self._under(self.reference, trajectories, share)
        scores = PhaseScores(old=old, ref=ref, penalties=kl_penalties(self.settings.algorithm, old, ref))
        if self.critic is not None:
            scores.values = self._shared(trajectories, share, self.critic.values)
        baseline = None
        if self.tracker is not None:
            numbers = prompts[np.array([t.group for t in trajectories])]
            baseline = self.tracker.values(numbers)
            drift = self._drift(numbers, share)
            # What was left out is no observation: the prompt's memory stays what it was.
            judged = np.array([t.left_out is None for t in trajectories])
            self.tracker.update(numbers[judged], np.array([t.reward for t in trajectories])[judged], drift[judged])
            for number, trajectory, logprobs in zip(numbers, trajectories, old, strict=True):
                if trajectory.left_out is None:
                    self.previous[int(number)] = (trajectory.ids, trajectory.trained, logprobs)
        scores.advantages, scores.returns = advantages_of(self.settings.algorithm, trajectories, scores, baseline)
        return scores

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Return what a checkpoint keeps."""
        return {
            prompt: {"ids": ids, "trained": trained, "logprobs": logprobs.tolist()}
            for prompt, (ids, trained, logprobs) in self.previous.items()
        }

    def load_state_dict(self, state: dict[int, dict[str, Any]]) -> None:
        """Go back to a checkpoint."""
        self.previous = {
            prompt: (kept["ids"], kept["trained"], np.array(kept["logprobs"], dtype=np.float32))
            for prompt, kept in state.items()
        }

    def _drift(self, numbers: np.ndarray, share: Share) -> np.ndarray:
        """Mean |log pi_now - log pi_then| of each prompt's previous answer; 0 where there is none."""
        drift = np.zeros(len(numbers))
        known = [(place, self.previous[int(n)]) for place, n in enumerate(numbers) if int(n) in self.previous]
        if not known:
            return drift
        then = [
            Trajectory(None, 0, ids, trained, sampler_logprobs=logprobs.tolist())  # type: ignore[arg-type]
            for _, (ids, trained, logprobs) in known
        ]
        now = self._under(self.policy, then, share)
        for (place, (_, _, before)), after in zip(known, now, strict=True):
            drift[place] = np.abs(after - before).mean()
        return drift

    def _under(self, model: CausalLM, trajectories: Sequence[Trajectory], share: Share) -> list[np.ndarray]:
        """Log-probabilities of the trained tokens under `model`."""
        temperature = self.settings.rollout.temperature
        return self._shared(trajectories, share, lambda packed, n: score_trajectories(model, packed, n, temperature))

    def _shared(
        self,
        trajectories: Sequence[Trajectory],
        share: Share,
        compute: Callable[[Sequence[PackedTrajectories], int], list[np.ndarray]],
    ) -> list[np.ndarray]:
        """Run `compute` on this process's share of the trajectories, and tell all processes the results."""
        numbers = range(share.rank, len(trajectories), share.world_size)
        results = compute(self.settings.pack(trajectories, numbers), len(trajectories))
        everyone = told_to_all({number: results[number] for number in numbers})
        return [everyone[number] for number in range(len(trajectories))]
