"""B14: scores of rows that see their padding, k1 as a loss, an old policy that never played, lost tails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.rl.helpers import saved, write_prompts
from tests.rl.phase_helpers import settings, stirred, trajectory

from minnow.cli import PRESETS, main
from minnow.config import UserError, parse_config
from minnow.data.batches import Share
from minnow.objectives.policy import PolicyLossConfig, policy_loss
from minnow.rl.advantages import PhaseScores
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.experience import PolicyObjective, pack_trajectories, score_trajectories
from minnow.rl.phase_experience import Experience
from minnow.stages.rl import Config

PRESET_NAMES = sorted(file.stem for file in PRESETS.glob("*.yaml"))


def episodes(count: int) -> list:
    rng = np.random.default_rng(4)
    return [trajectory(rng.integers(10, 300, 4 + 3 * n).tolist(), wrote=2 + n) for n in range(count)]


def test_an_answer_scores_the_same_alone_and_among_others() -> None:
    model, answers = stirred(), episodes(5)
    together = score_trajectories(model, pack_trajectories(answers, range(5), 40, 2), 5, temperature=1.0)
    for answer, scores in zip(answers, together, strict=True):
        exact = pack_trajectories([answer], [0], len(answer.ids) - 1, 1)  # a row of its own, without a tail
        (alone,) = score_trajectories(model, exact, 1, temperature=1.0)
        assert scores == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_straight_through"])
def test_the_kl_term_pulls_towards_the_reference(estimator: str) -> None:
    """Exactly, over a vocabulary of three: a step down the expected gradient must bring the policy nearer."""
    logits = torch.tensor([0.2, -0.4, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64), 0)
    config = PolicyLossConfig(kl_coef=1.0, kl_estimator=estimator)  # type: ignore[arg-type]

    def expected_gradient(config: PolicyLossConfig) -> torch.Tensor:
        logprobs = torch.log_softmax(logits, 0)
        old = logprobs.detach()
        loss = policy_loss(logprobs, old, torch.zeros(3), torch.arange(3), config, reference).loss_N
        (gradient,) = torch.autograd.grad((old.exp() * loss).sum(), [logits])  # tokens come as the policy draws them
        return gradient

    def divergence(at: torch.Tensor) -> float:
        logprobs = torch.log_softmax(at, 0)
        return float((logprobs.exp() * (logprobs - reference)).sum())

    gradient = expected_gradient(config)
    assert divergence(logits.detach() - 0.05 * gradient) < divergence(logits.detach()) - 0.01
    # The peer's k1: on average no gradient at all, only noise. It is refused; with the ratio it is right.
    with pytest.raises(UserError, match="k1.*no gradient on average"):
        PolicyLossConfig(kl_coef=1.0, kl_estimator="k1")
    weighted = expected_gradient(PolicyLossConfig(kl_coef=1.0, kl_estimator="k1", kl_ratio=True))
    assert divergence(logits.detach() - 0.05 * weighted) < divergence(logits.detach()) - 0.01


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_no_preset_has_k1_in_its_loss(preset: str) -> None:
    words = ["--config", str(PRESETS / f"{preset}.yaml"), "--init_from", "x", "--prompts", "y"]
    loss = parse_config(Config, words, program="minnow rl").algorithm.loss
    assert not loss.kl_coef or loss.kl_estimator != "k1"


@pytest.mark.parametrize("preset", ["grpo", "ppo"])
def test_the_old_policy_is_the_one_that_played(tmp_path: Path, preset: str) -> None:
    """At the first update of every phase the ratio is 1; at the second it is not."""
    settings = {
        "preset": preset, "init_from": saved(tmp_path / "start"), "run": tmp_path / "run",
        "prompts": write_prompts(tmp_path / "prompts.jsonl"), "phases": 3,
        "rollout.prompts": 4, "rollout.samples": 4 if preset == "grpo" else 1, "rollout.max_tokens": 6,
        "sequence_length": 64, "algorithm.epochs": 1, "algorithm.minibatches": 2, "rewards.answer": 0,
        "rewards.functions": "tests.rl.helpers:any_reward",
        "training.device": "cpu", "training.micro_batch_tokens": 128, "training.save_every": 0,
        "watch.patience": 0, "optim.matrix_lr": 0.05,
        **({"algorithm.critic.warmup_phases": 1} if preset == "ppo" else {}),
    }  # fmt: skip
    assert main(["rl", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]) == 0
    updates = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    moved = [update["kl_old"] for update in updates if "kl_old" in update]
    assert len(moved) == 6
    assert max(abs(kl) for kl in moved[::2]) < 1e-9
    assert min(moved[1::2]) > 1e-7


@pytest.mark.parametrize("rows", [1, 2])
def test_no_tail_of_the_accumulation_is_lost(rows: int) -> None:
    """Seven answers in micro-batches of any size: loss and gradient are those of all of them at once."""
    model, answers = stirred(), episodes(7)
    zeros = [np.zeros(answer.num_trained, np.float32) for answer in answers]
    advantages = [np.full(answer.num_trained, 1.0 + n, np.float32) for n, answer in enumerate(answers)]
    scores = PhaseScores(old=zeros, ref=None, penalties=zeros, advantages=advantages)
    phase = Experience(answers, list(range(7)), scores)
    loss = PolicyLossConfig(surrogate="none", aggregation="sequence")
    algorithm = AlgorithmConfig(loss=loss, correction_cap=None)
    objective = PolicyObjective(loss, temperature=1.0)

    def gradient(rows_per_micro_batch: int) -> tuple[float, torch.Tensor, int]:
        how = settings(algorithm)
        how = type(how)(**{**vars(how), "rows_per_micro_batch": rows_per_micro_batch})
        batches = phase.minibatch(how, list(range(7)), Share())
        model.zero_grad()
        count = sum(objective.count(batch) for batch in batches)
        for batch in batches:
            objective(model, batch).loss_sum.backward()
        return count, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), len(batches)

    whole, expected, one = gradient(100)
    count, cut, several = gradient(rows)
    assert (count, whole, one) == (7, 7, 1)
    assert several > 1
    torch.testing.assert_close(cut, expected, rtol=1e-4, atol=1e-4)
