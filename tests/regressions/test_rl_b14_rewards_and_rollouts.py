"""B14: a reward model that raised gave the score 0; answers were scored in padded rows without a mask; and the "old"
policy was a copy that was renewed every ten steps, not the one that had played.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from tests.rl.helpers import tiny
from tests.rl.test_rewards import episode

from minnow.config import UserError
from minnow.data.prompts import Prompt
from minnow.engine import Engine
from minnow.rl.environment import SingleTurn
from minnow.rl.experience import pack_trajectories, score_trajectories
from minnow.rl.rewards import RewardConfig, Rewarder
from minnow.rl.rollouts import RolloutConfig, Trajectory, play
from minnow.tokenizer.chat import Conversation, Message


def failing(conversations: object) -> list[float]:
    raise RuntimeError("CUDA out of memory")


def not_a_number(conversations: list[object]) -> list[float]:
    return [math.nan] * len(conversations)


@pytest.mark.parametrize("model", [failing, not_a_number])
def test_a_reward_model_that_fails_ends_the_run(monkeypatch, model) -> None:
    model.model = None  # what a judge judges by
    monkeypatch.setattr("minnow.rl.rewards.load_judge", lambda path, device: model)
    items = [episode("4"), episode("5")]
    with pytest.raises(UserError, match="the reward 'reward_model' (failed: RuntimeError: CUDA|gave nan)"):
        Rewarder(RewardConfig(reward_model="x")).score(items)


def stirred() -> Engine:
    model, tokenizer = tiny()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return Engine(model, tokenizer)


def played(engine: Engine) -> list[Trajectory]:
    texts = ["say 1", "say it is so and so and so, maybe", "no"]  # lengths that would need padding
    environments = [SingleTurn(Prompt(Conversation((Message("user", text),)))) for text in texts]
    return play(engine, environments, range(3), RolloutConfig(max_tokens=8), seed=0, longest=128)


def test_an_answer_is_scored_as_if_it_stood_alone() -> None:
    engine = stirred()
    trajectories = played(engine)
    assert len({len(t.ids) for t in trajectories}) > 1
    score = partial(score_trajectories, engine.model)
    together = score(pack_trajectories(trajectories, range(3), 128, 8), 3, 1.0)
    for number, trajectory in enumerate(trajectories):
        (alone,) = score(pack_trajectories([trajectory], [0], 128, 8), 1, 1.0)
        np.testing.assert_allclose(together[number], alone, atol=1e-5)


def test_the_old_policy_is_the_one_that_played() -> None:
    """After an update the same engine plays with the new weights, and what its sampler says is what they say."""
    engine = stirred()
    before = played(engine)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1.1)
    engine.weights_updated()
    after = played(engine)
    scores = score_trajectories(engine.model, pack_trajectories(after, range(3), 128, 8), 3, 1.0)
    for trajectory, old in zip(after, scores, strict=True):
        np.testing.assert_allclose(trajectory.sampler_logprobs, old, atol=1e-5)
    stale = score_trajectories(engine.model, pack_trajectories(before, range(3), 128, 8), 3, 1.0)
    assert max(np.abs(s - t.sampler_logprobs).max() for s, t in zip(stale, before, strict=True)) > 1e-3
