"""From a phase's experience to the loss: the correction for the sampler, and which answers are in some update."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from minnow.data.batches import Share
from minnow.model.attention import PackedAttention
from minnow.model.transformer import CausalLM
from minnow.objectives.policy import PolicyLossConfig
from minnow.rl.advantages import PhaseScores
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.experience import PolicyObjective, pack_trajectories, score_trajectories
from minnow.rl.phase_experience import Experience
from minnow.rl.rollouts import Trajectory
from tests.rl.phase_helpers import phases, settings, stirred, trajectory

# log pi_trainer - log pi_sampler of the tokens of two answers, which earn advantages of 1 and -0.5
MISMATCH = [[0.0, 0.5, 1.0], [-0.3, 0.0]]
ADVANTAGES = [1.0, -0.5]
# Weights exp(x), at most 2: of each token, or of its whole answer (sums 1.5 and -0.3; means 0.5 and -0.15)
WEIGHTS = {
    "token": [[1.0, 1.64872, 2.0], [0.74082, 1.0]],
    "sequence_sum": [[2.0, 2.0, 2.0], [0.74082, 0.74082]],
    "sequence_mean": [[1.64872, 1.64872, 1.64872], [0.86071, 0.86071]],
    None: [[1.0, 1.0, 1.0], [1.0, 1.0]],
}
# log pi - log pi_ref of the same tokens, and what a KL term in the loss weighs
DISTANCE = [[0.4, -0.7, 0.2], [1.0, -0.3]]
KL_COEF = 0.3


def experience(model: CausalLM, *, reference: bool = False) -> Experience:
    rng = np.random.default_rng(1)
    answers = [trajectory(rng.integers(10, 300, size).tolist(), wrote) for size, wrote in ((7, 3), (5, 2))]
    old = score_trajectories(model, pack_trajectories(answers, [0, 1], 32, 1), 2, temperature=1.0)
    for answer, logprobs, mismatch in zip(answers, old, MISMATCH, strict=True):
        answer.sampler_logprobs = [float(p) - x for p, x in zip(logprobs, mismatch, strict=True)]
    ref = [logprobs - np.array(x, np.float32) for logprobs, x in zip(old, DISTANCE, strict=True)]
    penalties = [np.zeros_like(logprobs) for logprobs in old]
    scores = PhaseScores(old=old, ref=ref if reference else None, penalties=penalties)
    scores.advantages = [np.full(len(p), a, np.float32) for p, a in zip(old, ADVANTAGES, strict=True)]
    return Experience(answers, [0, 1], scores)


@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
@pytest.mark.parametrize("level", list(WEIGHTS))
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_the_correction_for_the_sampler_reaches_the_loss(level: str | None, surrogate: str, kl_coef: float) -> None:
    """The ratio term of it: the KL term, where there is one, is what it would be without a correction."""
    model = stirred()
    loss = PolicyLossConfig(surrogate=surrogate, kl_coef=kl_coef)  # type: ignore[arg-type]
    algorithm = AlgorithmConfig(
        loss=loss, correction_cap=None if level is None else 2.0, correction_level=level or "token"  # type: ignore[arg-type]
    )  # fmt: skip
    phase = experience(model, reference=kl_coef > 0)
    (batch,) = phase.minibatch(settings(algorithm), [0, 1], Share())
    output = PolicyObjective(loss, temperature=1.0)(model, batch)
    gradient = torch.autograd.grad(output.loss_sum, list(model.parameters()), allow_unused=True)

    # At the first update the ratio is 1: the gradient is that of -sum of weight x advantage x log pi, and of the KL
    # term, which is k3's: exp(-x) + x - 1 with x = log pi - log pi_ref.
    surrogate_loss = torch.zeros(())
    value = 0.0
    for answer, weights, advantage, old, distance in zip(
        phase.trajectories, WEIGHTS[level], ADVANTAGES, phase.scores.old, DISTANCE, strict=True
    ):
        (alone,) = pack_trajectories([answer], [0], 32, 1)
        hidden = model(alone.batch.tokens_BT, alone.batch.positions_BT, PackedAttention(alone.batch.cu_seqlens))
        logprobs = torch.log_softmax(hidden @ model.head_weight.T, -1)
        own = alone.batch.weights_BT > 0
        chosen = logprobs[own].gather(1, alone.batch.targets_BT[own].unsqueeze(1)).squeeze(1)
        surrogate_loss = surrogate_loss - (torch.tensor(weights) * advantage * chosen).sum()
        x = chosen - torch.from_numpy(old) + torch.tensor(distance)
        surrogate_loss = surrogate_loss + kl_coef * (torch.exp(-x) + x - 1).sum()
        terms = np.ones(len(old)) if surrogate == "clip" else old
        value -= math.fsum(w * advantage * term for w, term in zip(weights, terms, strict=True))
        value += kl_coef * math.fsum(math.exp(-x) + x - 1 for x in distance)
    by_hand = torch.autograd.grad(surrogate_loss, list(model.parameters()), allow_unused=True)
    assert float(output.loss_sum) == pytest.approx(value, rel=1e-4)
    for mine, theirs in zip(gradient, by_hand, strict=True):
        if theirs is not None:
            assert mine is not None
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    if level == "token" and surrogate == "clip" and not kl_coef:
        assert float(output.loss_sum) == pytest.approx(-(1 + 1.64872 + 2) + 0.5 * (0.74082 + 1), rel=1e-4)


@pytest.mark.parametrize("drop", [True, False])
def test_answers_that_were_cut_off_are_in_no_update(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drop: bool
) -> None:
    """If the algorithm says so: the second and the fifth of six are cut off, and of all the log still tells.

    The fourth is left out: nobody could judge it, and it is in no update whatever the algorithm says.
    """
    algorithm = AlgorithmConfig(advantage="batch", drop_truncated=drop, minibatches=2)
    how = settings(algorithm, prompts=6)
    source, _ = phases(monkeypatch, tmp_path, how, lambda number, place: float(number % 3))
    score = source.rollouts.rewarder.score

    def judge(items: Sequence[Trajectory]) -> None:
        score(items)
        items[1].ending = items[4].ending = "length"
        items[3].left_out = "judge"

    monkeypatch.setattr(source.rollouts.rewarder, "score", judge)
    batches = [batch for step in (0, 1) for batch in source.micro_batches(step, Share())]
    trained = sorted(number for batch in batches for row in batch.document_ids for number in row)
    assert trained == ([0, 2, 5] if drop else [0, 1, 2, 4, 5])
    assert any(batch.advantages_N.any() for batch in batches)  # this phase teaches something
    (line,) = map(json.loads, (tmp_path / "rollouts.jsonl").read_text().splitlines())
    assert line["truncated"] == pytest.approx(2 / 6)


def test_a_phase_without_answers_to_learn_from_moves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All were cut off: a KL term alone pulled at the weights, on answers that are not to be trained on."""
    loss = PolicyLossConfig(kl_coef=0.5)
    how = settings(AlgorithmConfig(advantage="batch", drop_truncated=True, loss=loss), prompts=4)
    source, _ = phases(monkeypatch, tmp_path, how, lambda number, place: float(place), reference=stirred(1))
    score = source.rollouts.rewarder.score

    def judge(items: Sequence[Trajectory]) -> None:
        score(items)
        for item in items:
            item.ending = "length"

    monkeypatch.setattr(source.rollouts.rewarder, "score", judge)
    model = source.engine.model
    for batch in source.micro_batches(0, Share()):
        PolicyObjective(loss, temperature=1.0)(model, batch).loss_sum.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    (line,) = map(json.loads, (tmp_path / "rollouts.jsonl").read_text().splitlines())
    assert abs(line["kl_to_reference"]) > 1e-3  # and yet it is measured


@pytest.mark.parametrize("processes", [1, 2])
def test_every_answer_is_in_one_update_of_every_epoch(processes: int) -> None:
    rng = np.random.default_rng(2)
    answers = [trajectory(rng.integers(10, 300, 9).tolist(), 4) for _ in range(11)]
    zeros = [np.zeros(4, np.float32)] * 11
    kept = [n for n in range(11) if n != 5]
    phase = Experience(answers, kept, PhaseScores(old=zeros, ref=None, penalties=zeros, advantages=zeros))
    how = settings(AlgorithmConfig(epochs=2, minibatches=3))
    parts = phase.parts(how, phase=0)
    assert [len(part) for part in parts] == [4, 3, 3] * 2  # none is dropped for the sake of equal sizes
    assert [sorted(n for part in epoch for n in part) for epoch in (parts[:3], parts[3:])] == [kept, kept]
    assert parts[:3] != parts[3:]
    assert parts != phase.parts(how, phase=1)
    for part in parts:
        trained = []
        for rank in range(processes):
            for batch in phase.minibatch(how, part, Share(rank, processes)):
                trained += [number for row in batch.document_ids for number in row]
        assert sorted(trained) == sorted(part)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_share_of_clipped_tokens_is_a_share(aggregation: str) -> None:
    """All are clipped: with a constant length of 100 it was the answers' mean length over 100."""
    model = stirred()
    phase = experience(model)
    phase.scores.old = [logprobs - 1.0 for logprobs in phase.scores.old]  # the ratio is e
    phase.scores.advantages = [np.ones_like(logprobs) for logprobs in phase.scores.old]
    loss = PolicyLossConfig(aggregation=aggregation)  # type: ignore[arg-type]
    (batch,) = phase.minibatch(settings(AlgorithmConfig(loss=loss)), [0, 1], Share())
    objective = PolicyObjective(loss, temperature=1.0, constant_length=100)
    metrics, count = objective(model, batch).metrics, objective.count(batch)
    assert float(metrics["clip_fraction"]) / count == pytest.approx(1.0)
    assert float(metrics["kl_old"]) / count == pytest.approx(math.e - 2, rel=1e-4)  # e - 1 - log e


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_distance_from_the_reference_is_a_mean(aggregation: str) -> None:
    """Of k3, exp(-x) + x - 1, over the tokens or over the answers' own means; not weighted as the loss is."""
    model = stirred()
    phase = experience(model, reference=True)
    loss = PolicyLossConfig(aggregation=aggregation, kl_coef=KL_COEF)  # type: ignore[arg-type]
    (batch,) = phase.minibatch(settings(AlgorithmConfig(loss=loss)), [0, 1], Share())
    objective = PolicyObjective(loss, temperature=1.0, constant_length=100)
    found = float(objective(model, batch).metrics["kl_reference"]) / objective.count(batch)
    estimates = [[math.exp(-x) + x - 1 for x in answer] for answer in DISTANCE]
    of_tokens = math.fsum(each for answer in estimates for each in answer) / 5
    of_answers = math.fsum(math.fsum(answer) / len(answer) for answer in estimates) / 2
    assert found == pytest.approx(of_tokens if aggregation == "token" else of_answers, rel=1e-4)
