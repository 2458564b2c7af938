"""A phase's episodes with everything known about them: told to all processes, kept in checkpoints, cut into updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from minnow.data.batches import Share
from minnow.objectives.policy import sampler_correction
from minnow.rl.advantages import PhaseScores
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.experience import PackedTrajectories, PolicyBatch, nothing, pack_trajectories
from minnow.rl.rollouts import RolloutConfig, Trajectory
from minnow.training.distribution import gather, largest_over_ranks, world_size

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """Everything that decides what a phase is."""

    algorithm: AlgorithmConfig
    rollout: RolloutConfig
    sequence_length: int
    """Positions of a packed row; no episode may be longer."""
    rows_per_micro_batch: int
    seed: int

    def pack(self, trajectories: Sequence[Trajectory], chosen: Sequence[int]) -> list[PackedTrajectories]:
        """`chosen` trajectories in micro-batches."""
        return pack_trajectories(trajectories, chosen, self.sequence_length, self.rows_per_micro_batch)


@dataclass
class Experience:
    """A phase's episodes and everything known about them, the same on every process."""

    trajectories: list[Trajectory]
    kept: list[int]
    """Those that are trained on."""
    scores: PhaseScores

    def parts(self, settings: PhaseSettings, phase: int) -> list[list[int]]:
        """The trajectories of each update: every epoch another shuffle of all, cut into minibatches."""
        parts = []
        for epoch in range(settings.algorithm.epochs):
            rng = np.random.default_rng([settings.seed, phase + (1 << 20), 7, epoch])
            order = rng.permutation(np.array(self.kept))
            parts += [part.tolist() for part in np.array_split(order, settings.algorithm.minibatches)]
        return parts

    def minibatch(self, settings: PhaseSettings, part: Sequence[int], share: Share) -> list[PolicyBatch]:
        """This process's share of an update's trajectories, in micro-batches."""
        algorithm, scores = settings.algorithm, self.scores
        sampler = [np.array(t.sampler_logprobs, dtype=np.float32) for t in self.trajectories]
        micro_batches = settings.pack(self.trajectories, part[share.rank :: share.world_size])
        # All processes meet in every pass over a model in slices, so none may have one less; where little of a
        # phase was kept, some have no answer at all.
        missing = int(largest_over_ranks(len(micro_batches))) - len(micro_batches)
        micro_batches += [nothing(settings.sequence_length)] * missing
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

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "trajectories": [
                {"group": t.group, "ids": t.ids, "trained": t.trained, "sampler_logprobs": t.sampler_logprobs}
                for t in self.trajectories
            ],
            "kept": self.kept,
            "scores": {
                name: None if arrays is None else [torch.from_numpy(array) for array in arrays]
                for name, arrays in vars(self.scores).items()
            },
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Experience:
        """What the updates still need of a phase: not the answers' texts, rewards and environments."""
        trajectories = [Trajectory(environment=None, **kept) for kept in state["trajectories"]]  # type: ignore[arg-type]
        scores: dict[str, Any] = {
            name: None if tensors is None else [tensor.numpy() for tensor in tensors]
            for name, tensors in state["scores"].items()
        }
        return cls(trajectories, state["kept"], PhaseScores(**scores))


def told_to_all(mine: dict[int, T]) -> dict[int, T]:
    """The union of what all processes bring; what this one brought stays the same object."""
    union: dict[int, T] = {}
    for part in gather(mine if world_size() == 1 else {key: _plain(value) for key, value in mine.items()}):
        union |= part
    return union | mine


def _plain(value: T) -> T:
    """A value fit for a journey: an episode goes without its environment, which need not pickle."""
    return replace(value, environment=None) if isinstance(value, Trajectory) else value  # type: ignore[arg-type]
