"""Phases of rollouts as the Trainer's source of batches: draw, judge, compare, pack; then some updates on them.

With several processes each plays and scores its share of the episodes. Everything is then told to all of them, so that
baselines, whitening and minibatches are those of one process; each trains on its share of every minibatch.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from minnow.data.batches import Share
from minnow.data.order import global_batch_rows
from minnow.data.prompts import Prompt
from minnow.model.lora import adapters_off
from minnow.model.transformer import CausalLM
from minnow.objectives.policy import kl_divergence, sampler_correction
from minnow.rl.advantages import PhaseScores, advantages_of
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.critic import Critic
from minnow.rl.environment import Environment
from minnow.rl.experience import (
    PackedTrajectories,
    PolicyBatch,
    nothing,
    pack_trajectories,
    score_trajectories,
)
from minnow.rl.figures import phase_figures
from minnow.rl.phase_experience import Experience, told_to_all
from minnow.rl.rewards import Rewarder
from minnow.rl.rollouts import RolloutConfig, RolloutEngine, Trajectory, play
from minnow.rl.value_tracker import ValueTracker
from minnow.training.distribution import is_first, largest_over_ranks
from minnow.training.run_folder import MetricsLog

T = TypeVar("T")

MakeEnvironment = Callable[[Prompt], Environment]


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """Everything that decides what a phase is."""

    algorithm: AlgorithmConfig
    rollout: RolloutConfig
    sequence_length: int
    """Positions of a packed row; no episode may be longer."""
    rows_per_micro_batch: int
    seed: int


class Phases:
    """A BatchSource: step s belongs to phase s // updates_per_phase, whose rollouts are played when it begins.

    The policy plays as it is at that moment: the engine runs the training module itself. State that outlives a step
    (the phase's experience, SPO's tracker, the critic) goes into checkpoints, so a resumed run continues bit for bit.
    """

    def __init__(
        self,
        settings: PhaseSettings,
        *,
        engine: RolloutEngine,
        reference: CausalLM | None,
        critic: Critic | None,
        prompts: Sequence[Prompt],
        make_environment: MakeEnvironment,
        rewarder: Rewarder,
        log: MetricsLog,
        watch: Callable[[dict[str, float]], None],
    ) -> None:
        """`reference` may be the policy itself if that has adapters: they are switched off for it.

        `watch` sees every phase's figures, and stops the run by raising.
        """
        self.settings, self.engine, self.reference = settings, engine, reference
        self.prompts, self.make_environment, self.rewarder = prompts, make_environment, rewarder
        self.log, self.watch = log, watch
        self.phase = -1
        self.experience: Experience | None = None
        algorithm = settings.algorithm
        self.tracker = ValueTracker(len(prompts)) if algorithm.tracks_prompts else None
        self.critic = critic
        assert (critic is not None) == (algorithm.advantage == "gae")
        assert (reference is not None) == algorithm.needs_reference
        self.previous: dict[int, tuple[list[int], list[bool], np.ndarray]] = {}  # SPO: each prompt's last answer

    def micro_batches(self, step: int, share: Share) -> Sequence[PolicyBatch]:
        """Return this process's share of the step's minibatch, in micro-batches."""
        phase, update = divmod(step, self.settings.algorithm.updates_per_phase)
        if phase != self.phase:
            if self.phase < 0:
                self._prepare(share)
            self._begin(phase, share)
            self.phase = phase
        assert self.experience is not None
        return self._minibatch(self.experience, self._parts(phase, self.experience.kept)[update], share)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: tensors, numbers, lists and dicts of them."""
        return {
            "phase": self.phase,
            "experience": self.experience.state_dict() if self.experience else None,
            "tracker": self.tracker.state_dict() if self.tracker else None,
            "critic": self.critic.state_dict() if self.critic else None,
            "previous": {
                prompt: {"ids": ids, "trained": trained, "logprobs": logprobs.tolist()}
                for prompt, (ids, trained, logprobs) in self.previous.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.phase = state["phase"]
        self.experience = Experience.from_state(state["experience"]) if state["experience"] else None
        if self.tracker:
            self.tracker.load_state_dict(state["tracker"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
        self.previous = {
            prompt: (kept["ids"], kept["trained"], np.array(kept["logprobs"], dtype=np.float32))
            for prompt, kept in state["previous"].items()
        }
        if is_first():
            self.log.rewind(self.phase + 1)

    # --- Before the first phase -----------------------------------------------------------------------------------

    def _prepare(self, share: Share) -> None:
        """Teach the critic, or the tracker, what the policy that starts is worth."""
        if self.critic is not None:
            for phase in range(-self.settings.algorithm.critic.warmup_phases, 0):
                self._begin(phase, share)
        answers = self.settings.algorithm.tracker_answers
        if self.tracker is not None and answers:
            self.engine.model.eval()
            self.engine.weights_updated()
            for first in range(0, len(self.prompts), self.settings.rollout.prompts):
                numbers = range(first, min(first + self.settings.rollout.prompts, len(self.prompts)))
                trajectories = self._answers(numbers, answers, f"{self.settings.seed}/tracker/{first}", share)
                rewards = np.array([t.reward for t in trajectories]).reshape(-1, answers)
                for number, rewards_of_prompt in zip(numbers, rewards, strict=True):
                    self.tracker.seed(number, rewards_of_prompt)

    # --- One phase ------------------------------------------------------------------------------------------------

    def _begin(self, phase: int, share: Share) -> None:
        """Play, judge and score. A negative phase only teaches the critic."""
        start = time.perf_counter()
        self.engine.model.eval()
        self.engine.weights_updated()
        trajectories, chosen_prompts, figures = self._play(phase, share)
        played = time.perf_counter()
        scores = self._score(trajectories, chosen_prompts, share)
        kept = [n for n, t in enumerate(trajectories) if not self._dropped(t)]
        if len(kept) < self.settings.algorithm.minibatches:  # nearly all were cut off: this phase teaches nothing
            kept = list(range(len(trajectories)))
            scores.advantages = [np.zeros_like(advantage) for advantage in scores.advantages]
        self.engine.model.train()
        self.experience = Experience(trajectories, kept, scores)
        figures |= phase_figures(trajectories, scores, self.settings.rollout.samples)
        if self.critic is not None:
            figures["value_loss"] = self._teach_critic(phase, self.experience, share)
        figures |= {"seconds_playing": played - start, "seconds_scoring": time.perf_counter() - played}
        if is_first():
            updates = max(phase, 0) * self.settings.algorithm.updates_per_phase
            self.log.append({"step": phase, "updates": updates, **figures, **self._sample(trajectories)})
        self.watch(figures)

    def _play(self, phase: int, share: Share) -> tuple[list[Trajectory], np.ndarray, dict[str, float]]:
        """Rollouts for the phase's prompts; groups that teach nothing are replaced if the algorithm says so."""
        algorithm, rollout = self.settings.algorithm, self.settings.rollout
        kept: list[Trajectory] = []
        prompts: list[int] = []
        drawn = equal = 0
        for round_ in range(1 + algorithm.max_redraws if algorithm.drop_equal_groups else 1):
            groups = self._round(phase, round_, rollout.prompts - len(prompts), share)
            contrasting = [group for group in groups if len({t.reward for t in group[1]}) > 1]
            drawn += len(groups)
            equal += len(groups) - len(contrasting)
            for number, group in contrasting if algorithm.drop_equal_groups else groups:
                prompts.append(number)
                kept += group
            if len(prompts) >= rollout.prompts:
                break
        if not kept:  # no contrast anywhere: a phase that teaches nothing, which the watch will notice
            prompts, kept = [number for number, _ in groups], [t for _, group in groups for t in group]
        for place, trajectory in enumerate(kept):
            trajectory.group = place // rollout.samples
        if rollout.samples == 1:  # an answer is compared with the phase's others, not with its group
            equal = drawn if len({t.reward for t in kept}) == 1 else 0
        return kept, np.array(prompts), {"prompts": drawn, "equal_groups": equal / drawn}

    def _round(self, phase: int, round_: int, wanted: int, share: Share) -> list[tuple[int, list[Trajectory]]]:
        """Every chosen prompt with its answers."""
        samples = self.settings.rollout.samples
        numbers = self._choose(phase, round_, wanted)
        trajectories = self._answers(numbers.tolist(), samples, f"{self.settings.seed}/{phase}/{round_}", share)
        if self.tracker is not None and self.settings.algorithm.advantage != "tracker":
            rewards = np.array([t.reward for t in trajectories])
            self.tracker.update(np.repeat(numbers, samples), rewards, np.zeros(len(rewards)))
        return [(int(n), trajectories[i * samples : (i + 1) * samples]) for i, n in enumerate(numbers)]

    def _answers(self, numbers: Sequence[int], samples: int, seed: str, share: Share) -> list[Trajectory]:
        """`samples` judged answers to each prompt, in order; this process plays every `world_size`-th of them."""
        places = range(share.rank, len(numbers) * samples, share.world_size)
        mine = play(
            self.engine,
            [self.make_environment(self.prompts[numbers[place // samples]]) for place in places],
            places,
            self.settings.rollout,
            seed=zlib.crc32(seed.encode()),
            longest=self.settings.sequence_length,
        )
        self.rewarder.score(mine)
        everyone = told_to_all(dict(zip(places, mine, strict=True)))
        return [everyone[place] for place in sorted(everyone)]

    def _choose(self, phase: int, round_: int, wanted: int) -> np.ndarray:
        """Prompt numbers: a pure function of (seed, phase, round), with a tracker also of what it remembers."""
        total = len(self.prompts)
        if self.tracker is not None:
            weights = self.tracker.sampling_weights()
            rng = np.random.default_rng([self.settings.seed, phase + (1 << 20), round_])
            return rng.choice(total, size=min(wanted, total), replace=False, p=weights / weights.sum())
        seed = self.settings.seed + (round_ << 16) + (1 << 40 if phase < 0 else 0)
        return global_batch_rows(seed, abs(phase), self.settings.rollout.prompts, total)[:wanted]

    def _score(self, trajectories: Sequence[Trajectory], prompts: np.ndarray, share: Share) -> PhaseScores:
        """Log-probabilities under policy and reference, rewards of tokens, values, advantages."""
        algorithm, temperature = self.settings.algorithm, self.settings.rollout.temperature

        def under(model: CausalLM) -> list[np.ndarray]:
            return self._shared(
                trajectories, share, lambda packed, n: score_trajectories(model, packed, n, temperature)
            )

        old = under(self.engine.model)
        ref = None
        if self.reference is not None:
            with adapters_off(self.reference):
                ref = under(self.reference)
        penalties = [np.zeros_like(logprobs) for logprobs in old]
        if ref is not None and algorithm.kl_reward_coef:
            penalties = [
                algorithm.kl_reward_coef * _kl(o, r, algorithm.kl_reward_estimator)
                for o, r in zip(old, ref, strict=True)
            ]
        scores = PhaseScores(old=old, ref=ref, penalties=penalties)
        if self.critic is not None:
            scores.values = self._shared(trajectories, share, self.critic.values)
        baseline = None
        if self.tracker is not None and algorithm.advantage == "tracker":
            groups = np.array([t.group for t in trajectories])
            numbers = prompts[groups]
            baseline = self.tracker.values(numbers)
            drift = self._drift(numbers, share)
            self.tracker.update(numbers, np.array([t.reward for t in trajectories]), drift)
            for number, trajectory, logprobs in zip(numbers, trajectories, old, strict=True):
                self.previous[int(number)] = (trajectory.ids, trajectory.trained, logprobs)
        scores.advantages, scores.returns = advantages_of(algorithm, trajectories, scores, baseline)
        return scores

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
        now = self._shared(
            then,
            share,
            lambda packed, n: score_trajectories(self.engine.model, packed, n, self.settings.rollout.temperature),
        )
        for (place, (_, _, before)), after in zip(known, now, strict=True):
            drift[place] = np.abs(after - before).mean()
        return drift

    def _shared(
        self,
        trajectories: Sequence[Trajectory],
        share: Share,
        compute: Callable[[Sequence[PackedTrajectories], int], list[np.ndarray]],
    ) -> list[np.ndarray]:
        """Run `compute` on this process's share of the trajectories, and tell all processes the results."""
        numbers = range(share.rank, len(trajectories), share.world_size)
        results = compute(self._pack(trajectories, numbers), len(trajectories))
        everyone = told_to_all({number: results[number] for number in numbers})
        return [everyone[number] for number in range(len(trajectories))]

    def _teach_critic(self, phase: int, experience: Experience, share: Share) -> float:
        assert self.critic is not None
        losses = []
        for part in self._parts(phase, experience.kept):
            tokens = sum(experience.trajectories[number].num_trained for number in part)
            packed = self._pack(experience.trajectories, part[share.rank :: share.world_size])
            losses.append(self.critic.update(packed, experience.scores.values, experience.scores.returns, tokens))
        return float(np.mean(losses))

    def _parts(self, phase: int, kept: Sequence[int]) -> list[list[int]]:
        """The trajectories of each update: every epoch another shuffle, cut into minibatches."""
        algorithm = self.settings.algorithm
        parts = []
        for epoch in range(algorithm.epochs):
            rng = np.random.default_rng([self.settings.seed, phase + (1 << 20), 7, epoch])
            order = rng.permutation(np.array(kept))
            parts += [part.tolist() for part in np.array_split(order, algorithm.minibatches)]
        return parts

    def _minibatch(self, experience: Experience, part: Sequence[int], share: Share) -> list[PolicyBatch]:
        algorithm, scores = self.settings.algorithm, experience.scores
        sampler = [np.array(t.sampler_logprobs, dtype=np.float32) for t in experience.trajectories]
        micro_batches = self._pack(experience.trajectories, part[share.rank :: share.world_size])
        # All processes meet in every pass over a model in slices, so none may have one less; where little of a
        # phase was kept, some have no answer at all.
        missing = int(largest_over_ranks(len(micro_batches))) - len(micro_batches)
        micro_batches += [nothing(self.settings.sequence_length)] * missing
        batches = []
        for packed in micro_batches:
            sequence_N, old_N = packed.sequence_N, packed.flat(scores.old)
            correction_N = None
            if algorithm.correction_cap is not None:
                correction_N = sampler_correction(
                    old_N, packed.flat(sampler), sequence_N, algorithm.correction_level, algorithm.correction_cap
                )
            batches.append(
                PolicyBatch(
                    **vars(packed.batch),
                    sequence_N=sequence_N,
                    num_sequences=len(packed.lengths),
                    advantages_N=packed.flat(scores.advantages),
                    old_logprobs_N=old_N,
                    ref_logprobs_N=packed.flat(scores.ref) if scores.ref and algorithm.loss.kl_coef else None,
                    correction_N=correction_N,
                )
            )
        return batches

    def _pack(self, trajectories: Sequence[Trajectory], chosen: Sequence[int]) -> list[PackedTrajectories]:
        return pack_trajectories(
            trajectories, chosen, self.settings.sequence_length, self.settings.rows_per_micro_batch
        )

    def _dropped(self, trajectory: Trajectory) -> bool:
        return self.settings.algorithm.drop_truncated and trajectory.ending == "length"

    def _sample(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """One episode for a person to read: the first of this process's own, as others come without environment."""
        for episode in trajectories:
            if episode.environment is not None:
                reference = json.loads(json.dumps(episode.environment.prompt.reference, default=str))
                text = self.engine.tokenizer.decode(episode.ids)
                judged = {"reward": episode.reward, "rewards": episode.rewards}
                return {"sample": {"text": text, **judged, "reference": reference}}
        return {}


def _kl(old: np.ndarray, ref: np.ndarray, estimator: Any) -> np.ndarray:
    return kl_divergence(torch.from_numpy(old), torch.from_numpy(ref), estimator).numpy()
