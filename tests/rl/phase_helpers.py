"""Phases without an engine: answers of random tokens, rewards by a function, a clock that only moves when told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minnow.data.prompts import Prompt
from minnow.model.transformer import CausalLM
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.collapse import Watch, WatchConfig
from minnow.rl.critic import Critic
from minnow.rl.environment import SingleTurn
from minnow.rl.phase_experience import PhaseSettings
from minnow.rl.phases import Phases
from minnow.rl.rollouts import RolloutConfig, Trajectory
from minnow.rl.stopwatch import Stopwatch
from minnow.tokenizer.chat import Conversation, Message
from minnow.training.metrics_log import MetricsLog
from tests.rl.helpers import tiny

Reward = Callable[[int, int], float]
"""(number of the prompt, place in what is judged together) -> reward."""


def prompt(number: int) -> Prompt:
    return Prompt(Conversation((Message("user", f"say {number}"),)), reference=number)


def stirred(seed: int = 0) -> CausalLM:
    """A model that says something: at initialisation every position says the same."""
    model, _ = tiny(seed)
    stir(model, seed)
    return model


def stir(model: CausalLM, seed: int, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def trajectory(ids: Sequence[int], wrote: int, reward: float = 0.0, **more: Any) -> Trajectory:
    """An episode whose last `wrote` tokens are the model's."""
    trained = [False] * (len(ids) - wrote) + [True] * wrote
    more = {"sampler_logprobs": [-1.0] * wrote, "answers": [Message("assistant", "so")], **more}
    return Trajectory(SingleTurn(prompt(0)), 0, list(ids), trained, reward=reward, rewards={"r": reward}, **more)


def settings(algorithm: AlgorithmConfig, **rollout: int) -> PhaseSettings:
    return PhaseSettings(
        algorithm=algorithm,
        rollout=RolloutConfig(**{"prompts": 4, "samples": 1, "max_tokens": 8, **rollout}),
        sequence_length=32,
        rows_per_micro_batch=2,
        seed=3,
    )


@dataclass
class Clock:
    """Moves by so many seconds when something is done."""

    now: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: {"play": 3.0, "judge": 2.0, "score": 5.0})

    def does(self, what: str) -> None:
        self.now += self.seconds[what]


def phases(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    how: PhaseSettings,
    reward: Reward,
    *,
    prompts: int = 12,
    model: CausalLM | None = None,
    critic: Critic | None = None,
    reference: CausalLM | None = None,
) -> tuple[Phases, Clock]:
    """Phases whose answers are three random tokens, a pure function of the seed and the place."""
    clock = Clock()

    def play(engine: Any, environments: Any, places: Any, config: Any, *, seed: int, longest: int) -> list[Trajectory]:
        clock.does("play")
        played = []
        for place, environment in zip(places, environments, strict=True):
            ids = np.random.default_rng([seed, place]).integers(10, 300, size=6).tolist()
            played.append(trajectory(ids, 3, ending="stop"))
            played[-1].environment = environment
        return played

    def judge(items: Sequence[Trajectory]) -> None:
        clock.does("judge")
        for place, item in enumerate(items):
            item.reward = reward(item.environment.prompt.reference, place)
            item.rewards = {"r": item.reward}

    monkeypatch.setattr("minnow.rl.phase_rollouts.play", play)
    policy = model or stirred()
    return Phases(
        how,
        engine=SimpleNamespace(model=policy, tokenizer=SimpleNamespace(decode=str), weights_updated=lambda: None),  # type: ignore[arg-type]
        reference=reference,
        critic=critic,
        prompts=[prompt(number) for number in range(prompts)],
        make_environment=SingleTurn,
        rewarder=SimpleNamespace(score=judge),  # type: ignore[arg-type]
        log=MetricsLog(folder / "rollouts.jsonl"),
        watch=Watch(WatchConfig(patience=0)),
        stopwatch=Stopwatch(lambda: clock.now),
    ), clock
