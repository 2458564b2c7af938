"""How the policy does on prompts that it does not practise on, answered greedily, and drawn from if asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minnow.data.prompts import Prompt
from minnow.model.transformer import CausalLM
from minnow.rl.environment import Environment
from minnow.rl.figures import pass_figures, thinking_figures
from minnow.rl.left_out import left_out_figures, settle
from minnow.rl.phase_experience import told_to_all
from minnow.rl.rewards import Rewarder
from minnow.rl.rollouts import RolloutConfig, RolloutEngine, Trajectory, play
from minnow.training.distribution import rank, world_size


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
    samples: int = 0
    """Answers drawn to each prompt besides the greedy one."""

    def __call__(self, model: CausalLM) -> dict[str, float]:
        """Means of rewards (as far as judged in time) and of the length in tokens; pass@1 and pass@N of drawn ones."""
        self.engine.model.eval()
        self.engine.weights_updated()
        trajectories = self._answers(1, greedy=True)
        figures = {"held_out/reward": float(np.mean([t.reward for t in trajectories]))}
        for name in trajectories[0].rewards:
            figures[f"held_out/{name}"] = float(np.mean([t.rewards[name] for t in trajectories]))
        figures |= {f"held_out/{name}": count for name, count in left_out_figures(trajectories).items() if count}
        figures |= {f"held_out/{name}": value for name, value in thinking_figures(trajectories).items()}
        figures["held_out/tokens"] = float(np.mean([t.num_trained for t in trajectories]))
        if self.samples:
            drawn = pass_figures(self._answers(self.samples, greedy=False), self.samples)
            figures |= {f"held_out/{name}": value for name, value in drawn.items()}
        return figures

    def _answers(self, samples: int, *, greedy: bool) -> list[Trajectory]:
        """Judged answers, those to one prompt together; drawn with the same random numbers at every validation.

        Each process plays and judges its share, so that a judge is asked once about an answer.
        """
        total = len(self.prompts) * samples
        places = range(rank(), total, world_size())
        environments = [self.make_environment(self.prompts[place // samples]) for place in places]
        mine = play(self.engine, environments, places, self.rollout, seed=0, longest=self.longest, greedy=greedy)
        self.rewarder.score(mine)
        everyone = told_to_all(dict(zip(places, mine, strict=True)))
        played = [everyone[place] for place in range(total)]
        settle(played, samples, len(played))
        return played
