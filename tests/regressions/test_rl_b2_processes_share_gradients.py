"""B2: reinforcement learning on several processes that never exchanges gradients trains as many models as processes.

Two processes must make the same updates as one, for a group baseline, for a critic and for the tracker.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.rl.helpers import saved, write_prompts
from tests.training.distributed.processes import run_processes

from minnow.cli import main

SETTINGS = {
    "phases": 3,
    "rollout.prompts": 3,
    "rollout.max_tokens": 6,
    "sequence_length": 64,
    "training.micro_batch_tokens": 128,
    "training.device": "cpu",
    "training.precision": "fp32",
    "training.save_every": 0,
    "watch.patience": 0,
    "rewards.length": 0.5,
    "rewards.longest": 4,
    "optim.matrix_lr": 0.01,
}


@pytest.mark.parametrize("preset", ["grpo", "dapo", "ppo", "spo"])
def test_two_processes_make_the_updates_of_one(tmp_path, preset):
    """DAPO's nine answers come in minibatches of two and of one: the second process has none of the last."""
    start = saved(tmp_path / "start")
    # Of four prompts most come again in every phase: what each process remembers of them must be the same.
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4 if preset == "spo" else 8)
    settings = SETTINGS | {"rollout.samples": 1, "algorithm.minibatches": 1}
    if preset in ("grpo", "dapo"):
        settings |= {"rollout.samples": 3, "algorithm.minibatches": 1 if preset == "grpo" else 5}
    if preset == "ppo":
        settings |= {"algorithm.critic.warmup_phases": 1}
    if preset == "spo":
        settings |= {"rewards.answer": 0, "rewards.length": 0, "rewards.functions": "tests.rl.helpers:any_reward"}
        del settings["rewards.longest"]
    if preset == "dapo":  # in 15 updates Muon would make a difference of the last digit in small gradients a large one
        settings |= {"optim.optimizer": "adamw", "optim.eps": 0.1}
    words = ["rl", "--preset", preset, "--init_from", str(start), "--prompts", str(prompts)]
    words += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert main([*words, "--run", str(tmp_path / "one")]) == 0
    run_processes("minnow", *words, "--run", str(tmp_path / "two"), world_size=2)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    before = load_file(start / "model.safetensors")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(before[key], one[key]) for key in one)
    logs = [
        list(map(json.loads, (tmp_path / name / "rollouts.jsonl").read_text().splitlines())) for name in ("one", "two")
    ]
    for alone, together in zip(*logs, strict=True):
        figures = [key for key, value in alone.items() if isinstance(value, float) and not key.startswith("seconds")]
        assert {"reward", "entropy"} | ({"value_loss"} if preset == "ppo" else set()) <= set(figures)
        for key in figures:
            assert together[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-6), key
