"""Phases of rollouts as the Trainer's source of batches: draw, judge, compare, pack; then some updates on them.

With several processes each plays and scores its share of the episodes. Everything is then told to all of them, so that
baselines, whitening and minibatches are those of one process; each trains on its share of every minibatch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from minnow.data.batches import Share
from minnow.data.prompts import Prompt
from minnow.model.transformer import CausalLM
from minnow.rl.collapse import Watch
from minnow.rl.critic import Critic
from minnow.rl.experience import PolicyBatch
from minnow.rl.figures import phase_figures
from minnow.rl.phase_experience import Experience, PhaseSettings
from minnow.rl.phase_rollouts import MakeEnvironment, PhaseRollouts
from minnow.rl.phase_scores import PhaseScorer
from minnow.rl.rewards import Rewarder
from minnow.rl.rollouts import RolloutEngine, Trajectory
from minnow.rl.stopwatch import Stopwatch
from minnow.rl.value_tracker import ValueTracker
from minnow.training.distribution import is_first
from minnow.training.metrics_log import MetricsLog


class Phases:
    """A BatchSource: step s belongs to phase s // updates_per_phase, whose rollouts are played when it begins.

    The policy plays as it is at that moment: the engine runs the training module itself. State that outlives a step
    (the phase's experience, SPO's tracker, the critic, the watch) goes into checkpoints, so a resumed run continues bit
    for bit.
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
        watch: Watch,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """`reference` may be the policy itself if that has adapters: they are switched off for it."""
        algorithm = settings.algorithm
        assert (critic is not None) == (algorithm.advantage == "gae")
        assert (reference is not None) == algorithm.needs_reference
        self.settings, self.engine, self.critic, self.log, self.watch = settings, engine, critic, log, watch
        self.stopwatch = stopwatch or Stopwatch()
        self.tracker = ValueTracker(len(prompts)) if algorithm.tracks_prompts else None
        self.rollouts = PhaseRollouts(
            settings, engine, prompts, make_environment, rewarder, self.tracker, self.stopwatch
        )
        self.scorer = PhaseScorer(settings, engine.model, reference, critic, self.tracker)
        self.phase = -1
        self.experience: Experience | None = None

    def micro_batches(self, step: int, share: Share) -> Sequence[PolicyBatch]:
        """Return this process's share of the step's minibatch, in micro-batches. CollapseError if the watch says so."""
        phase, update = divmod(step, self.settings.algorithm.updates_per_phase)
        if phase != self.phase:
            if self.phase < 0:
                self._prepare(share)
            self._begin(phase, share)
            self.phase = phase
        self.watch.check()
        assert self.experience is not None
        part = self.experience.parts(self.settings, phase)[update]
        return self.experience.minibatch(self.settings, part, share)

    @property
    def doubted_since(self) -> int | None:
        """Updates that were done when the answers began to look like a collapse; None where they do not."""
        return self.watch.since

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: tensors, numbers, lists and dicts of them."""
        return {
            "phase": self.phase,
            "experience": self.experience.state_dict() if self.experience else None,
            "tracker": self.tracker.state_dict() if self.tracker else None,
            "critic": self.critic.state_dict() if self.critic else None,
            "previous": self.scorer.state_dict(),
            "watch": self.watch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.phase = state["phase"]
        self.experience = Experience.from_state(state["experience"]) if state["experience"] else None
        if self.tracker:
            self.tracker.load_state_dict(state["tracker"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
        self.scorer.load_state_dict(state["previous"])
        self.watch.load_state_dict(state["watch"])
        if is_first():
            self.log.rewind(self.phase + 1)

    def _prepare(self, share: Share) -> None:
        """Teach the critic, or the tracker, what the policy that starts is worth."""
        if self.critic is not None:
            for phase in range(-self.settings.algorithm.critic.warmup_phases, 0):
                self._begin(phase, share)
        answers = self.settings.algorithm.tracker_answers
        if self.tracker is not None and answers:
            self.engine.model.eval()
            self.engine.weights_updated()
            self.rollouts.seed_tracker(answers, share)

    def _begin(self, phase: int, share: Share) -> None:
        """Play, judge and score. A negative phase only teaches the critic."""
        self.engine.model.eval()
        with self.stopwatch.timing("playing"):
            self.engine.weights_updated()
        trajectories, prompts, figures = self.rollouts.play(phase, share)
        with self.stopwatch.timing("scoring"):
            scores = self.scorer.score(trajectories, prompts, share)
        kept = [n for n, t in enumerate(trajectories) if not self._dropped(t)]
        figures |= phase_figures(trajectories, scores, self.settings.rollout.samples)
        minibatches = self.settings.algorithm.minibatches
        teaches = len(kept) >= minibatches
        if not teaches:  # nearly all were cut off or left out: nothing is learnt, by a KL term neither
            count = max(len(trajectories), minibatches)  # and none of the updates stays without an answer
            kept = [n % len(trajectories) for n in range(count)]
            scores.advantages, scores.ref = [np.zeros_like(advantage) for advantage in scores.advantages], None
        self.engine.model.train()
        self.experience = Experience(trajectories, kept, scores)
        if self.critic is not None and teaches:
            with self.stopwatch.timing("teaching"):
                figures["value_loss"] = self._teach_critic(phase, self.experience, share)
        updates = max(phase, 0) * self.settings.algorithm.updates_per_phase
        seconds = self.stopwatch.take()
        if is_first():
            self.log.append({"step": phase, "updates": updates, **figures, **seconds, **self._sample(trajectories)})
        self.watch.look(figures, updates)

    def _teach_critic(self, phase: int, experience: Experience, share: Share) -> float:
        assert self.critic is not None
        losses = []
        for part in experience.parts(self.settings, phase):
            tokens = sum(experience.trajectories[number].num_trained for number in part)
            packed = self.settings.pack(experience.trajectories, part[share.rank :: share.world_size])
            losses.append(self.critic.update(packed, experience.scores.values, experience.scores.returns, tokens))
        return float(np.mean(losses))

    def _dropped(self, trajectory: Trajectory) -> bool:
        cut_off = self.settings.algorithm.drop_truncated and trajectory.ending == "length"
        return cut_off or trajectory.left_out is not None

    def _sample(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """One episode for a person to read: the first of this process's own, as others come without environment."""
        for episode in trajectories:
            if episode.environment is not None:
                reference = json.loads(json.dumps(episode.environment.prompt.reference, default=str))
                text = self.engine.tokenizer.decode(episode.ids)
                judged = {"reward": episode.reward, "rewards": episode.rewards}
                return {"sample": {"text": text, **judged, "reference": reference}}
        return {}
