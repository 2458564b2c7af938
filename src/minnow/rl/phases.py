"""Phases of rollouts as the Trainer's source of batches: draw, judge, compare, pack; then some updates on them."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from minnow.config import UserError
from minnow.data.batches import Share, global_batch_rows
from minnow.data.prompts import Prompt
from minnow.model.lora import adapters_off
from minnow.model.transformer import CausalLM
from minnow.objectives.policy import kl_divergence, sampler_correction
from minnow.rl.advantages import PhaseScores, advantages_of
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.critic import Critic
from minnow.rl.environment import Environment
from minnow.rl.experience import PackedTrajectories, PolicyBatch, pack_trajectories, score_trajectories
from minnow.rl.figures import phase_figures
from minnow.rl.rewards import Rewarder
from minnow.rl.rollouts import RolloutConfig, RolloutEngine, Trajectory, play
from minnow.rl.value_tracker import ValueTracker
from minnow.training.run_folder import MetricsLog

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
    (the phase's batches, SPO's tracker, the critic) goes into checkpoints, so a resumed run continues bit for bit.
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
        self.minibatches: list[list[PolicyBatch]] = []
        algorithm = settings.algorithm
        self.tracker = ValueTracker(len(prompts)) if algorithm.advantage == "tracker" else None
        self.critic = critic
        assert (critic is not None) == (algorithm.advantage == "gae")
        assert (reference is not None) == algorithm.needs_reference
        self.previous: dict[int, tuple[list[int], list[bool], np.ndarray]] = {}  # SPO: each prompt's last answer

    def micro_batches(self, step: int, share: Share) -> Sequence[PolicyBatch]:
        """Return the step's minibatch, in micro-batches."""
        if share.world_size > 1:
            raise UserError("reinforcement learning runs in one process: leave out --nproc and torchrun")
        phase, update = divmod(step, self.settings.algorithm.updates_per_phase)
        if phase != self.phase:
            if self.phase < 0:
                self.log.path.unlink(missing_ok=True)
            if self.phase < 0 and self.critic is not None:
                for warmup in range(self.settings.algorithm.critic.warmup_phases):
                    self._begin(-1 - warmup)
            self._begin(phase)
            self.phase = phase
        return self.minibatches[update]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: tensors, numbers, lists and dicts of them."""
        return {
            "phase": self.phase,
            "minibatches": [[_as_dict(batch) for batch in minibatch] for minibatch in self.minibatches],
            "tracker": self.tracker.state_dict() if self.tracker else None,
            "critic": self.critic.training_state() if self.critic else None,
            "previous": {
                prompt: {"ids": ids, "trained": trained, "logprobs": logprobs.tolist()}
                for prompt, (ids, trained, logprobs) in self.previous.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.phase = state["phase"]
        self.minibatches = [[PolicyBatch(**batch) for batch in minibatch] for minibatch in state["minibatches"]]
        if self.tracker:
            self.tracker.load_state_dict(state["tracker"])
        if self.critic:
            self.critic.load_training_state(state["critic"])
        self.previous = {
            prompt: (kept["ids"], kept["trained"], np.array(kept["logprobs"], dtype=np.float32))
            for prompt, kept in state["previous"].items()
        }
        self.log.rewind(self.phase + 1)

    # --- One phase ------------------------------------------------------------------------------------------------

    def _begin(self, phase: int) -> None:
        """Play, judge, score and pack. A negative phase only teaches the critic."""
        start = time.perf_counter()
        self.engine.model.eval()
        self.engine.weights_updated()
        trajectories, chosen_prompts, figures = self._play(phase)
        played = time.perf_counter()
        packed = self._pack(trajectories, range(len(trajectories)))
        scores = self._score(trajectories, packed, chosen_prompts)
        kept = [n for n, t in enumerate(trajectories) if not self._dropped(t)]
        if len(kept) < self.settings.algorithm.minibatches:  # nearly all were cut off: this phase teaches nothing
            kept = list(range(len(trajectories)))
            scores.advantages = [np.zeros_like(advantage) for advantage in scores.advantages]
        self.engine.model.train()
        figures |= phase_figures(trajectories, scores, self.settings.rollout.samples)
        if self.critic is not None:
            figures["value_loss"] = self._teach_critic(phase, trajectories, kept, scores)
        if phase >= 0:
            self.minibatches = [
                self._minibatch(trajectories, part, scores) for part in self._parts(phase, trajectories, kept)
            ]
        figures |= {"seconds_playing": played - start, "seconds_scoring": time.perf_counter() - played}
        self.log.append({"step": phase, **figures, "sample": self._sample(trajectories)})
        self.watch(figures)

    def _play(self, phase: int) -> tuple[list[Trajectory], np.ndarray, dict[str, float]]:
        """Rollouts for the phase's prompts; groups that teach nothing are replaced if the algorithm says so."""
        algorithm, rollout = self.settings.algorithm, self.settings.rollout
        kept: list[Trajectory] = []
        prompts: list[int] = []
        drawn = equal = 0
        for round_ in range(1 + algorithm.max_redraws if algorithm.drop_equal_groups else 1):
            groups = self._round(phase, round_, rollout.prompts - len(prompts))
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
        return kept, np.array(prompts), {"prompts": drawn, "equal_groups": equal / drawn}

    def _round(self, phase: int, round_: int, wanted: int) -> list[tuple[int, list[Trajectory]]]:
        samples = self.settings.rollout.samples
        numbers = self._choose(phase, round_, wanted)
        environments = [self.make_environment(self.prompts[n]) for n in numbers for _ in range(samples)]
        groups = [group for group in range(len(numbers)) for _ in range(samples)]
        seed = zlib.crc32(f"{self.settings.seed}/{phase}/{round_}".encode())
        trajectories = play(self.engine, environments, groups, self.settings.rollout, seed=seed)
        self.rewarder.score(trajectories)
        return [(int(n), trajectories[i * samples : (i + 1) * samples]) for i, n in enumerate(numbers)]

    def _choose(self, phase: int, round_: int, wanted: int) -> np.ndarray:
        """Prompt numbers: a pure function of (seed, phase, round), for SPO also of the tracker."""
        total = len(self.prompts)
        if self.tracker is not None:
            weights = self.tracker.sampling_weights()
            rng = np.random.default_rng([self.settings.seed, phase + (1 << 20), round_])
            return rng.choice(total, size=min(wanted, total), replace=False, p=weights / weights.sum())
        seed = self.settings.seed + (round_ << 16) + (1 << 40 if phase < 0 else 0)
        return global_batch_rows(seed, abs(phase), self.settings.rollout.prompts, total)[:wanted]

    def _score(
        self, trajectories: Sequence[Trajectory], packed: Sequence[PackedTrajectories], prompts: np.ndarray
    ) -> PhaseScores:
        """Log-probabilities under policy and reference, rewards of tokens, values, advantages."""
        algorithm, temperature = self.settings.algorithm, self.settings.rollout.temperature
        total = len(trajectories)
        old = score_trajectories(self.engine.model, packed, total, temperature)
        ref = None
        if self.reference is not None:
            with adapters_off(self.reference):
                ref = score_trajectories(self.reference, packed, total, temperature)
        penalties = [np.zeros_like(logprobs) for logprobs in old]
        if ref is not None and algorithm.kl_reward_coef:
            penalties = [
                algorithm.kl_reward_coef * _kl(o, r, algorithm.kl_reward_estimator)
                for o, r in zip(old, ref, strict=True)
            ]
        scores = PhaseScores(old=old, ref=ref, penalties=penalties)
        if self.critic is not None:
            scores.values = self.critic.values(packed, total)
        baseline = None
        if self.tracker is not None:
            groups = np.array([t.group for t in trajectories])
            numbers = prompts[groups]
            baseline = self.tracker.values(numbers)
            drift = self._drift(numbers)
            self.tracker.update(numbers, np.array([t.reward for t in trajectories]), drift)
            for number, trajectory, logprobs in zip(numbers, trajectories, old, strict=True):
                self.previous[int(number)] = (trajectory.ids, trajectory.trained, logprobs)
        scores.advantages, scores.returns = advantages_of(algorithm, trajectories, scores, baseline)
        return scores

    def _drift(self, numbers: np.ndarray) -> np.ndarray:
        """Mean |log pi_now - log pi_then| of each prompt's previous answer; 0 where there is none."""
        drift = np.zeros(len(numbers))
        known = [(place, self.previous[int(n)]) for place, n in enumerate(numbers) if int(n) in self.previous]
        if not known:
            return drift
        then = [
            Trajectory(None, 0, ids, trained, sampler_logprobs=logprobs.tolist())  # type: ignore[arg-type]
            for _, (ids, trained, logprobs) in known
        ]
        packed = self._pack(then, range(len(then)))
        now = score_trajectories(self.engine.model, packed, len(then), self.settings.rollout.temperature)
        for (place, (_, _, before)), after in zip(known, now, strict=True):
            drift[place] = np.abs(after - before).mean()
        return drift

    def _teach_critic(
        self, phase: int, trajectories: Sequence[Trajectory], kept: Sequence[int], scores: PhaseScores
    ) -> float:
        assert self.critic is not None
        losses = []
        for part in self._parts(phase, trajectories, kept):
            losses.append(self.critic.update(self._pack(trajectories, part), scores.values, scores.returns))
        return float(np.mean(losses))

    def _parts(self, phase: int, trajectories: Sequence[Trajectory], kept: Sequence[int]) -> list[list[int]]:
        """The trajectories of each update: every epoch another shuffle, cut into minibatches."""
        algorithm = self.settings.algorithm
        parts = []
        for epoch in range(algorithm.epochs):
            rng = np.random.default_rng([self.settings.seed, phase + (1 << 20), 7, epoch])
            order = rng.permutation(np.array(kept))
            parts += [part.tolist() for part in np.array_split(order, algorithm.minibatches)]
        return parts

    def _minibatch(
        self, trajectories: Sequence[Trajectory], part: Sequence[int], scores: PhaseScores
    ) -> list[PolicyBatch]:
        algorithm = self.settings.algorithm
        sampler = [np.array(t.sampler_logprobs, dtype=np.float32) for t in trajectories]
        batches = []
        for packed in self._pack(trajectories, part):
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
        """One episode for a person to read."""
        first = trajectories[0]
        return {
            "text": self.engine.tokenizer.decode(first.ids),
            "reward": first.reward,
            "rewards": first.rewards,
            "reference": json.loads(json.dumps(first.environment.prompt.reference, default=str)),
        }


def _kl(old: np.ndarray, ref: np.ndarray, estimator: Any) -> np.ndarray:
    return kl_divergence(torch.from_numpy(old), torch.from_numpy(ref), estimator).numpy()


def _as_dict(batch: PolicyBatch) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in fields(batch)}
