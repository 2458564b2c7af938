"""The examination during a run, shared out among the processes."""

from pathlib import Path
from typing import Any

import pytest

from minnow.data.prompts import read_prompts
from minnow.rl.environments import environment_maker
from minnow.rl.held_out import HeldOut
from minnow.rl.rewards import RewardConfig, Rewarder
from minnow.rl.rollouts import RolloutConfig, Trajectory, live_engine
from tests.rl.helpers import tiny, write_prompts


def test_every_answer_is_played_and_judged_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process played and judged them all: eight GPUs took as long as one, and asked a judge eight times."""
    model, tokenizer = tiny()
    judged: list[str] = []

    class Counting(Rewarder):
        def score(self, trajectories: list[Trajectory]) -> None:  # type: ignore[override]
            judged.extend(trajectory.environment.prompt.reference for trajectory in trajectories)
            super().score(trajectories)

    held_out = HeldOut(
        live_engine(model, tokenizer),
        read_prompts((str(write_prompts(tmp_path / "prompts.jsonl", 5)),)),
        environment_maker("question", pond=None, seconds=1.0),
        Counting(RewardConfig(answer=0, functions=("tests.rl.helpers:any_reward",))),
        RolloutConfig(max_tokens=6),
        longest=64,
        samples=2,
    )
    everyone: list[dict[int, Trajectory]] = []
    monkeypatch.setattr("minnow.rl.held_out.told_to_all", lambda mine: everyone.append(mine) or mine)
    alone = held_out(model)
    assert len(judged) == 5 + 2 * 5  # greedily, and two draws each

    judged.clear()
    for rank in range(3):
        whole = iter(list(everyone[:2]))
        monkeypatch.setattr("minnow.rl.held_out.rank", lambda rank=rank: rank)
        monkeypatch.setattr("minnow.rl.held_out.world_size", lambda: 3)
        monkeypatch.setattr("minnow.rl.held_out.told_to_all", lambda mine, whole=whole: next(whole) | mine)
        assert held_out(model) == pytest.approx(alone)
    assert len(judged) == 5 + 2 * 5


def test_one_answer_is_the_likeliest_and_the_others_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny()
    engine = live_engine(model, tokenizer)
    temperatures: list[list[float]] = []
    generate = engine.generate

    def watched(prompts: Any, params: Any) -> Any:
        temperatures.append([each.temperature for each in params])
        return generate(prompts, params)

    monkeypatch.setattr(engine, "generate", watched)
    held_out = HeldOut(
        engine,
        read_prompts((str(write_prompts(tmp_path / "prompts.jsonl", 3)),)),
        environment_maker("question", pond=None, seconds=1.0),
        Rewarder(RewardConfig(answer=0, functions=("tests.rl.helpers:any_reward",))),
        RolloutConfig(max_tokens=4, temperature=0.7),
        longest=64,
        samples=2,
    )
    held_out(model)
    assert temperatures == [[0.0] * 3, [0.7] * 6]
