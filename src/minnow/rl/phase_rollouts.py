"""A phase's rollouts: which prompts are asked, and their judged answers; groups without contrast drawn again."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from minnow.data.batches import Share
from minnow.data.order import global_batch_rows
from minnow.data.prompts import Prompt
from minnow.rl.environment import Environment
from minnow.rl.left_out import settle
from minnow.rl.phase_experience import PhaseSettings, told_to_all
from minnow.rl.rewards import Rewarder
from minnow.rl.rollouts import RolloutEngine, Trajectory, play
from minnow.rl.stopwatch import Stopwatch
from minnow.rl.value_tracker import ValueTracker

MakeEnvironment = Callable[[Prompt], Environment]


class PhaseRollouts:
    """Plays phases. Prompts and draws are a pure function of (seed, phase) and of what the tracker remembers."""

    def __init__(
        self,
        settings: PhaseSettings,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        make_environment: MakeEnvironment,
        rewarder: Rewarder,
        tracker: ValueTracker | None,
        stopwatch: Stopwatch,
    ) -> None:
        self.settings, self.engine, self.prompts = settings, engine, prompts
        self.make_environment, self.rewarder = make_environment, rewarder
        self.tracker, self.stopwatch = tracker, stopwatch

    def play(self, phase: int, share: Share) -> tuple[list[Trajectory], np.ndarray, dict[str, float]]:
        """Judged answers to the phase's prompts, the groups' prompt numbers, and how many were drawn.

        Groups that teach nothing are replaced, by other prompts' and in `max_redraws` rounds at most, if the algorithm
        says so.
        """
        algorithm, rollout = self.settings.algorithm, self.settings.rollout
        kept: list[Trajectory] = []
        prompts: list[int] = []
        asked: list[int] = []
        equal = 0
        for round_ in range(1 + algorithm.max_redraws if algorithm.drop_equal_groups else 1):
            groups = self._round(phase, round_, rollout.prompts - len(prompts), asked, share)
            contrasting = [group for group in groups if len({t.reward for t in group[1]}) > 1]
            asked += [number for number, _ in groups]
            equal += len(groups) - len(contrasting)
            for number, group in contrasting if algorithm.drop_equal_groups else groups:
                prompts.append(number)
                kept += group
            if len(prompts) >= rollout.prompts or len(set(asked)) == len(self.prompts):
                break
        if not kept:  # no contrast anywhere: a phase that teaches nothing, which the watch will notice
            prompts, kept = [number for number, _ in groups], [t for _, group in groups for t in group]
        for place, trajectory in enumerate(kept):
            trajectory.group = place // rollout.samples
        if rollout.samples == 1:  # an answer is compared with the phase's others, not with its group
            equal = len(asked) if len({t.reward for t in kept}) == 1 else 0
        return kept, np.array(prompts), {"prompts": len(asked), "equal_groups": equal / len(asked)}

    def seed_tracker(self, answers: int, share: Share) -> None:
        """Let the tracker start from so many answers to every prompt."""
        assert self.tracker is not None
        for first in range(0, len(self.prompts), self.settings.rollout.prompts):
            numbers = range(first, min(first + self.settings.rollout.prompts, len(self.prompts)))
            trajectories = self._answers(numbers, answers, f"{self.settings.seed}/tracker/{first}", share)
            for place, number in enumerate(numbers):
                group = trajectories[place * answers : (place + 1) * answers]
                rewards = np.array([t.reward for t in group if t.left_out is None])
                if len(rewards):
                    self.tracker.seed(number, rewards)

    def _round(
        self, phase: int, round_: int, wanted: int, asked: Sequence[int], share: Share
    ) -> list[tuple[int, list[Trajectory]]]:
        """Every chosen prompt with its answers."""
        samples = self.settings.rollout.samples
        numbers = self._choose(phase, round_, wanted, asked)
        trajectories = self._answers(numbers.tolist(), samples, f"{self.settings.seed}/{phase}/{round_}", share)
        if self.tracker is not None and self.settings.algorithm.advantage != "tracker":
            judged = np.array([t.left_out is None for t in trajectories])
            rewards = np.array([t.reward for t in trajectories])[judged]
            self.tracker.update(np.repeat(numbers, samples)[judged], rewards, np.zeros(len(rewards)))
        return [(int(n), trajectories[i * samples : (i + 1) * samples]) for i, n in enumerate(numbers)]

    def _answers(self, numbers: Sequence[int], samples: int, seed: str, share: Share) -> list[Trajectory]:
        """`samples` judged answers to each prompt, in order; this process plays every `world_size`-th of them."""
        places = range(share.rank, len(numbers) * samples, share.world_size)
        with self.stopwatch.timing("playing"):
            mine = play(
                self.engine,
                [self.make_environment(self.prompts[numbers[place // samples]]) for place in places],
                places,
                self.settings.rollout,
                seed=zlib.crc32(seed.encode()),
                longest=self.settings.sequence_length,
            )
        with self.stopwatch.timing("judging"):
            self.rewarder.score(mine)
            everyone = told_to_all(dict(zip(places, mine, strict=True)))
        episodes = [everyone[place] for place in sorted(everyone)]
        settle(episodes, samples, self.settings.rollout.prompts * self.settings.rollout.samples)
        return episodes

    def _choose(self, phase: int, round_: int, wanted: int, asked: Sequence[int]) -> np.ndarray:
        """Prompt numbers: a pure function of (seed, phase, round), with a tracker also of what it remembers.

        Later rounds ask none of those that the phase has `asked`.
        """
        total = len(self.prompts)
        if self.tracker is None and round_ == 0:
            seed = self.settings.seed + (1 << 40 if phase < 0 else 0)
            return global_batch_rows(seed, abs(phase), wanted, total)
        others = np.setdiff1d(np.arange(total), asked)
        weights = np.ones(len(others)) if self.tracker is None else self.tracker.sampling_weights()[others]
        rng = np.random.default_rng([self.settings.seed, phase + (1 << 20), round_])
        return rng.choice(others, size=min(wanted, len(others)), replace=False, p=weights / weights.sum())
