"""B4: a reference in fp32 beside a policy in bf16 is another distribution: a KL before anything is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.rl.helpers import saved, write_prompts

from minnow.cli import main


@pytest.mark.parametrize("lora", [[], ["--lora.rank", "2"]], ids=["a second model", "adapters off"])
def test_the_first_phase_of_a_bf16_run_is_at_no_distance_from_its_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: list[str]
) -> None:
    monkeypatch.setattr("minnow.training.speed.matmul_peak", lambda device, dtype: 1e9)  # a minute in bf16 on some CPUs
    settings = {
        "preset": "grpo", "init_from": saved(tmp_path / "start"), "run": tmp_path / "run",
        "prompts": write_prompts(tmp_path / "prompts.jsonl"), "phases": 2,
        "rollout.prompts": 2, "rollout.samples": 4, "rollout.max_tokens": 6, "sequence_length": 64,
        "rewards.answer": 0, "rewards.functions": "tests.rl.helpers:any_reward",
        "training.precision": "bf16", "training.device": "cpu",
        "training.micro_batch_tokens": 128, "training.save_every": 0, "watch.patience": 0, "optim.matrix_lr": 0.05,
    }  # fmt: skip
    assert main(["rl", *(word for key, value in settings.items() for word in (f"--{key}", str(value))), *lora]) == 0
    phases = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    updates = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert phases[0]["kl_to_reference"] == 0
    assert updates[0]["kl_reference"] == pytest.approx(0, abs=1e-6)  # the loss's own estimate, of the first update
    assert phases[1]["kl_to_reference"] != 0  # it is measured: after two updates there is a distance
