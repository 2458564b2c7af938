"""A phase's episodes with everything known about them: told to all processes, kept in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from minnow.rl.advantages import PhaseScores
from minnow.rl.rollouts import Trajectory
from minnow.training.distribution import gather, world_size

T = TypeVar("T")


@dataclass
class Experience:
    """A phase's episodes and everything known about them, the same on every process."""

    trajectories: list[Trajectory]
    kept: list[int]
    """Those that are trained on."""
    scores: PhaseScores

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
