"""How the policy does on prompts that it does not practise on, answered greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minnow.data.prompts import Prompt
from minnow.model.transformer import CausalLM
from minnow.rl.environment import Environment
from minnow.rl.rewards import Rewarder
from minnow.rl.rollouts import RolloutConfig, RolloutEngine, play


@dataclass(frozen=True)
class HeldOut:
    """An evaluation for the Trainer."""

    engine: RolloutEngine
    prompts: Sequence[Prompt]
    make_environment: Callable[[Prompt], Environment]
    rewarder: Rewarder
    rollout: RolloutConfig
    longest: int
    """Tokens of the longest episode."""

    def __call__(self, model: CausalLM) -> dict[str, float]:
        """Mean of every reward over the held-out prompts, and the mean length in tokens."""
        self.engine.model.eval()
        self.engine.weights_updated()
        environments = [self.make_environment(prompt) for prompt in self.prompts]
        places = range(len(environments))
        trajectories = play(self.engine, environments, places, self.rollout, seed=0, longest=self.longest, greedy=True)
        self.rewarder.score(trajectories)
        figures = {"held_out/reward": float(np.mean([t.reward for t in trajectories]))}
        for name in trajectories[0].rewards:
            figures[f"held_out/{name}"] = float(np.mean([t.rewards[name] for t in trajectories]))
        figures["held_out/length"] = float(np.mean([t.num_trained for t in trajectories]))
        return figures
