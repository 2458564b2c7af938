"""A phase's scores by hand: KL inside the reward, and SPO's tracker that forgets as fast as the policy moves."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minnow.data.batches import Share
from minnow.model.attention import PackedAttention
from minnow.model.transformer import CausalLM
from minnow.rl import phase_scores
from minnow.rl.advantages import advantages_of
from minnow.rl.algorithm import AdvantageKind, AlgorithmConfig, CriticConfig
from minnow.rl.phase_scores import PhaseScorer
from minnow.rl.rollouts import Trajectory
from minnow.rl.value_tracker import ValueTracker
from tests.rl.phase_helpers import phases, settings, stir, stirred, trajectory

OLD = [np.array([-1.0, -2.0, -0.5], np.float32), np.array([-0.25], np.float32)]
REF = [np.array([-1.5, -1.0, -0.5], np.float32), np.array([-0.25], np.float32)]
# log pi - log pi_ref of the first answer: 0.5, -1, 0; of the second: 0
KL = {
    "k1": [0.5, -1.0, 0.0],
    "k2": [0.125, 0.5, 0.0],
    "k3": [0.10653066, 0.71828183, 0.0],  # exp(-0.5) + 0.5 - 1, exp(1) - 1 - 1, 0
}


def scored(monkeypatch: pytest.MonkeyPatch, advantage: AdvantageKind, estimator: str) -> phase_scores.PhaseScores:
    """Two answers to one prompt, worth 1 and 0; the KL inside the reward weighs 0.1."""
    policy, reference = stirred(), stirred(1)
    known = {id(policy): OLD, id(reference): REF}
    monkeypatch.setattr(phase_scores, "score_trajectories", lambda model, packed, n, temperature: known[id(model)])
    algorithm = AlgorithmConfig(
        advantage=advantage,
        kl_reward_coef=0.1,
        kl_reward_estimator=estimator,  # type: ignore[arg-type]
        critic=CriticConfig(gamma=1.0, lam=1.0) if advantage == "gae" else CriticConfig(),
    )
    critic: Any = SimpleNamespace(values=lambda packed, n: [np.zeros(3, np.float32), np.zeros(1, np.float32)])
    scorer = PhaseScorer(settings(algorithm), policy, reference, critic if advantage == "gae" else None, None)
    answers = [trajectory([5, 6, 7, 8, 9], 3, 1.0, ending="stop"), trajectory([5, 6, 7], 1, 0.0, ending="stop")]
    return scorer.score(answers, np.array([0]), Share())


@pytest.mark.parametrize("estimator", list(KL))
def test_ppo_pays_for_every_token_that_leaves_the_reference(monkeypatch: pytest.MonkeyPatch, estimator: str) -> None:
    scores = scored(monkeypatch, "gae", estimator)
    a, b, c = KL[estimator]
    # No discount and values of 0: a token's return is the reward at the end minus what it and later ones are charged.
    by_hand = [1 - 0.1 * (a + b + c), 1 - 0.1 * (b + c), 1 - 0.1 * c]
    assert scores.returns[0] == pytest.approx(by_hand, abs=1e-6)
    assert scores.returns[1] == pytest.approx([0.0], abs=1e-6)
    four = np.array([*by_hand, 0.0])  # whitened over all tokens
    white = (four - four.mean()) / np.sqrt(four.var() + 1e-8)
    assert np.concatenate(scores.advantages) == pytest.approx(white, abs=1e-5)


def test_reinforce_plus_plus_pays_for_the_tokens_that_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """arXiv 2501.03262, equations 8 to 10: the reward less the KL from a token on, whitened over the batch's tokens."""
    a, b, c = KL["k1"]
    four = np.array([1 - 0.1 * (a + b + c), 1 - 0.1 * (b + c), 1 - 0.1 * c, 0.0])
    white = (four - four.mean()) / np.sqrt(four.var() + 1e-8)
    assert np.concatenate(scored(monkeypatch, "batch", "k1").advantages) == pytest.approx(white, abs=1e-5)


@pytest.mark.parametrize(("advantage", "scale"), [("group", math.sqrt(0.5) + 1e-4), ("group_centred", 1.0)])
def test_a_group_s_deviation_scales_where_it_is_to(advantage: AdvantageKind, scale: float) -> None:
    """Rewards 1 and 0: 1/2 beside their mean, and sqrt(1/2) is their unbiased deviation."""
    answers = [trajectory([5, 6, 7], 2, 1.0), trajectory([5, 6], 1, 0.0)]
    zeros = [np.zeros(2, np.float32), np.zeros(1, np.float32)]
    scores = phase_scores.PhaseScores(old=zeros, ref=None, penalties=zeros)
    advantages, _ = advantages_of(AlgorithmConfig(advantage=advantage), answers, scores, None)
    assert np.concatenate(advantages) == pytest.approx([0.5 / scale, 0.5 / scale, -0.5 / scale], rel=1e-6)


def test_the_critic_s_gamma_and_lambda_are_those_of_the_settings() -> None:
    # r = (0, 1), V = (.5, .25), gamma .5, lambda .8: A_1 = .75; A_0 = .5 x .25 - .5 + .4 x .75 = -.075
    answer = trajectory([5, 6, 7], 2, 1.0, ending="stop")
    zeros, values = [np.zeros(2, np.float32)], [np.array([0.5, 0.25], np.float32)]
    scores = phase_scores.PhaseScores(old=zeros, ref=None, penalties=zeros, values=values)
    algorithm = AlgorithmConfig(advantage="gae", critic=CriticConfig(gamma=0.5, lam=0.8))
    _, (returns,) = advantages_of(algorithm, [answer], scores, None)
    assert returns == pytest.approx([0.425, 1.0])


@pytest.mark.parametrize("estimator", list(KL))
def test_without_a_critic_the_answer_pays_for_all_its_tokens(monkeypatch: pytest.MonkeyPatch, estimator: str) -> None:
    scores = scored(monkeypatch, "leave_one_out", estimator)
    worth = 1 - 0.1 * sum(KL[estimator])
    assert scores.advantages[0] == pytest.approx([worth] * 3, abs=1e-6)  # the other answer is worth 0
    assert scores.advantages[1] == pytest.approx([-worth], abs=1e-6)


def logprobs_alone(model: CausalLM, episode: Trajectory) -> np.ndarray:
    """Log-probabilities of what the model wrote in one episode, by itself and in float64 from the logits on."""
    ids = torch.tensor(episode.ids)
    n = len(ids) - 1
    with torch.no_grad():
        hidden = model(ids[None, :-1], torch.arange(n)[None], PackedAttention(torch.tensor([0, n], dtype=torch.int32)))
    logits = hidden[0].double() @ model.head_weight.detach().double().T
    chosen = torch.log_softmax(logits, -1)[torch.arange(n), ids[1:]]
    return chosen[torch.tensor(episode.trained[1:])].numpy()


def test_spo_forgets_as_fast_as_the_policy_moves() -> None:
    """Four phases of three or four prompts against a loop in float64; the policy moves a little, then much, then not.

    In the third phase one answer is left out: its prompt's memory stays, and drift is counted from the answer before.
    """
    model = stirred()
    tracker = ValueTracker(4)
    scorer = PhaseScorer(settings(AlgorithmConfig(advantage="tracker")), model, None, None, tracker)
    alpha, beta = [0.5] * 4, [0.5] * 4
    last: dict[int, tuple[Trajectory, np.ndarray]] = {}
    rng = np.random.default_rng(0)
    factors = []
    for phase, moved in enumerate((0.0, 0.0008, 0.05, 0.0)):
        stir(model, seed=phase + 5, size=moved)
        prompts = rng.permutation(4)[: 4 if phase == 3 else 3]  # in the end that of the left-out answer too
        answers = [trajectory(rng.integers(10, 300, 7).tolist(), 4, round(rng.random(), 3)) for _ in prompts]
        for group, answer in enumerate(answers):
            answer.group = group
        if phase == 2:
            answers[next(place for place, prompt in enumerate(prompts.tolist()) if prompt in last)].left_out = "judge"
        scores = scorer.score(answers, prompts, Share())
        surprise = []
        for prompt, answer in zip(prompts.tolist(), answers, strict=True):
            if answer.left_out:
                continue
            surprise.append(answer.reward - alpha[prompt] / (alpha[prompt] + beta[prompt]))  # before the update
            rho = 0.96
            if prompt in last:
                then, before = last[prompt]
                distance = np.abs(logprobs_alone(model, then) - before).mean()
                rho = min(max(2 ** (-distance / 0.06), 0.875), 0.96)
                factors.append(rho)
            alpha[prompt] = rho * alpha[prompt] + answer.reward
            beta[prompt] = rho * beta[prompt] + 1 - answer.reward
            last[prompt] = (answer, logprobs_alone(model, answer))
        white = (np.array(surprise) - np.mean(surprise)) / math.sqrt(np.var(surprise) + 1e-8)
        advantages = [a[0] for a, answer in zip(scores.advantages, answers, strict=True) if not answer.left_out]
        assert advantages == pytest.approx(white, abs=1e-4)
        assert tracker.alpha_P == pytest.approx(alpha, abs=1e-4)
        assert tracker.beta_P == pytest.approx(beta, abs=1e-4)
    assert {0.875, 0.96} < set(factors)  # both bounds were met, and something between them
    assert any(0.88 < rho < 0.955 for rho in factors)


def test_a_restored_tracker_gives_the_same_next_phase(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    how = settings(AlgorithmConfig(advantage="tracker", tracker_answers=2, minibatches=2), prompts=6)

    def reward(number: int, place: int) -> float:
        return round((number * 37 + place * 11) % 10 / 10, 1)

    model = stirred()
    run, _ = phases(monkeypatch, tmp_path, how, reward, model=model)
    for step in range(6):
        run.micro_batches(step, Share())
        stir(model, seed=step, size=0.002)
    buffer = io.BytesIO()
    torch.save(run.state_dict(), buffer)
    buffer.seek(0)
    resumed, _ = phases(monkeypatch, tmp_path, how, reward, model=copy.deepcopy(model))
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    forgot, _ = phases(monkeypatch, tmp_path, how, reward, model=copy.deepcopy(model))
    forgot.phase = 2  # as if it had been there, and remembered nothing
    for step in (6, 7, 8):
        batches = [source.micro_batches(step, Share()) for source in (run, resumed, forgot)]
        for one, other in zip(batches[0], batches[1], strict=True):
            for name in ("tokens_BT", "advantages_N", "old_logprobs_N", "sequence_N"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
        advantages = [torch.cat([batch.advantages_N for batch in source]) for source in batches]
        assert not torch.equal(advantages[0], advantages[2])
        assert run.tracker is not None
        assert resumed.tracker is not None
        assert np.array_equal(run.tracker.alpha_P, resumed.tracker.alpha_P)
        assert np.array_equal(run.tracker.beta_P, resumed.tracker.beta_P)
