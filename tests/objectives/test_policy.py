"""Policy losses and advantages against TRL and against loops written out by hand."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minnow.config import UserError
from minnow.objectives.advantages import (
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    whiten,
)
from minnow.objectives.policy import (
    PolicyLossConfig,
    aggregation_count,
    kl_divergence,
    policy_loss,
    sampler_correction,
    token_weights,
    value_loss,
)

LENGTHS = (4, 6, 2, 6)
B, P, T = len(LENGTHS), 3, max(LENGTHS)


class Accelerator:
    num_processes, sync_gradients, device = 1, True, torch.device("cpu")

    def gather(self, x):
        return x.reshape(-1)

    def gather_for_metrics(self, x):
        return x

    def reduce(self, x, reduction="sum"):
        return x


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs_BT = normal(B, T)
    mask_BT = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
    return SimpleNamespace(
        logprobs_BT=logprobs_BT.requires_grad_(),
        old_BT=logprobs_BT.detach() + 0.3 * normal(B, T),
        ref_BT=logprobs_BT.detach() + 0.2 * normal(B, T),
        mask_BT=mask_BT,
        advantages_B=torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64),
        sequence_N=torch.arange(B).unsqueeze(1).expand(B, T)[mask_BT],
    )


def trl_grpo(case, loss_type, *, level="token", beta=0.0, high=0.2, bias_correction=False):
    trl = pytest.importorskip("trl")
    stub = SimpleNamespace(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=high,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=T,
        accelerator=Accelerator(),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(use_bias_correction_kl=bias_correction, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *a, **k: (case.logprobs_BT, torch.rand(B, T), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(B, P, dtype=torch.long),
        "prompt_mask": torch.ones(B, P),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": case.mask_BT.double(),
        "advantages": case.advantages_B,
        "old_per_token_logps": case.old_BT,
        "ref_per_token_logps": case.ref_BT,
        "num_items_in_batch": case.mask_BT.sum(),
    }
    return trl.GRPOTrainer._compute_loss(stub, None, inputs)


def ours(case, config, sequences=range(B)):
    """Sum of weighted token losses of some of the sequences, and its count."""
    chosen_N = torch.isin(case.sequence_N, torch.tensor(list(sequences)))
    _, sequence_N = case.sequence_N[chosen_N].unique(return_inverse=True)
    flat = [x[case.mask_BT][chosen_N] for x in (case.logprobs_BT, case.old_BT, case.ref_BT)]
    result = policy_loss(
        flat[0],
        flat[1],
        case.advantages_B[case.sequence_N[chosen_N]],
        sequence_N,
        config,
        flat[2] if config.kl_coef else None,
    )
    weights_N = token_weights(sequence_N, len(sequences), config.aggregation, constant_length=T)
    return (weights_N * result.loss_N).sum(), aggregation_count(len(sequence_N), len(sequences), config.aggregation)


PARITY = {
    "grpo": ({"loss_type": "grpo"}, {"aggregation": "sequence"}),
    "bnpo": ({"loss_type": "bnpo"}, {"aggregation": "token"}),
    "dapo": ({"loss_type": "dapo", "high": 0.28}, {"aggregation": "token", "clip_high": 0.28}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"aggregation": "constant"}),
    "cispo": ({"loss_type": "cispo", "high": 1.2}, {"surrogate": "cispo", "clip_high": 0.2}),
    "gspo": ({"loss_type": "grpo", "level": "sequence"}, {"ratio": "sequence_mean", "aggregation": "sequence"}),
}
KL = {
    "no kl": ({}, {}),
    "k3": ({"beta": 0.04}, {"kl_coef": 0.04}),
    "k3 times ratio": ({"beta": 0.04, "bias_correction": True}, {"kl_coef": 0.04, "kl_ratio": True}),
}


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("name", PARITY)
def test_loss_and_gradient_equal_trl(case, name, kl):
    if name == "gspo" and kl == "k3 times ratio":
        pytest.skip("TRL multiplies GSPO's KL by the sequence's ratio; the correction is a token's")
    theirs, mine = PARITY[name]
    expected = trl_grpo(case, **theirs, **KL[kl][0])
    (expected_gradient,) = torch.autograd.grad(expected, case.logprobs_BT, retain_graph=True)
    loss_sum, count = ours(case, PolicyLossConfig(**mine, **KL[kl][1]))
    (gradient,) = torch.autograd.grad(loss_sum / count, case.logprobs_BT)
    torch.testing.assert_close(loss_sum / count, expected.double(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient, expected_gradient.double(), rtol=1e-6, atol=1e-8)


def test_rloo_equals_trl(case):
    rloo = pytest.importorskip("trl.trainer.rloo_trainer")
    stub = SimpleNamespace(
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        accelerator=Accelerator(),
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(),
        _get_per_token_logps_and_entropies=lambda *a, **k: (case.logprobs_BT, torch.rand(B, T), None),
    )
    mask_BT = case.mask_BT.double()
    inputs = {
        "prompt_ids": torch.zeros(B, P, dtype=torch.long),
        "prompt_mask": torch.ones(B, P),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": mask_BT,
        "advantages": case.advantages_B,
        "old_per_token_logps": case.old_BT,
        "old_logps": (case.old_BT * mask_BT).sum(1),
        "num_items_in_batch": mask_BT.sum(),
    }
    expected = rloo.RLOOTrainer._compute_loss(stub, None, inputs)
    (expected_gradient,) = torch.autograd.grad(expected, case.logprobs_BT, retain_graph=True)
    loss_sum, count = ours(case, PolicyLossConfig(ratio="sequence_sum", aggregation="sequence"))
    (gradient,) = torch.autograd.grad(loss_sum / count, case.logprobs_BT)
    torch.testing.assert_close(loss_sum / count, expected.double(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient, expected_gradient.double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_micro_batches_change_nothing(case, aggregation):
    config = PolicyLossConfig(aggregation=aggregation, ratio="sequence_mean", kl_coef=0.1)
    whole, whole_count = ours(case, config)
    (expected,) = torch.autograd.grad(whole / whole_count, case.logprobs_BT)
    parts = [ours(case, config, part) for part in ([0], [1, 2], [3])]
    count = sum(part[1] for part in parts)
    (gradient,) = torch.autograd.grad(sum(part[0] for part in parts) / count, case.logprobs_BT)
    assert count == whole_count
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    # A = -2, r = e^2 = 7.4: plain PPO's loss is -min(-14.8, 1.2 * -2) = 14.8; with c = 3 it is 6, without gradient.
    logprobs = torch.tensor([2.0], requires_grad=True)
    old, advantage, sequence = torch.zeros(1), torch.tensor([-2.0]), torch.zeros(1, dtype=torch.long)
    free = policy_loss(logprobs, old, advantage, sequence, PolicyLossConfig())
    assert free.loss_N.item() == pytest.approx(2 * math.exp(2))
    bound = policy_loss(logprobs, old, advantage, sequence, PolicyLossConfig(dual_clip=3.0))
    assert bound.loss_N.item() == pytest.approx(6.0)
    assert bound.clipped_N.item() == 1.0
    bound.loss_N.sum().backward()
    assert logprobs.grad.item() == 0.0


def test_dual_clip_bounds_bad_tokens_alone():
    # A = 2, r = 1: the loss of a good token is -2, which is more than -3 A = -6.
    one, sequence = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    result = policy_loss(one, one, torch.tensor([2.0]), sequence, PolicyLossConfig(dual_clip=3.0))
    assert (result.loss_N.item(), result.clipped_N.item()) == (-2.0, 0.0)


def test_what_is_told_of_each_token():
    """Ratios e^0.5, 1 and e^-1 of one answer; the cap of cispo is 1.2, and e^(-1/6) the geometric mean."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    log_ratio = torch.tensor([0.5, 0.0, -1.0])
    old, advantages, sequence = logprobs.detach() - log_ratio, torch.ones(3), torch.zeros(3, dtype=torch.long)
    for config, clipped in (
        (PolicyLossConfig(surrogate="cispo"), [1.0, 0.0, 0.0]),
        (PolicyLossConfig(surrogate="clip"), [1.0, 0.0, 0.0]),  # of a good token the lower bound takes nothing
        (PolicyLossConfig(surrogate="clip", ratio="sequence_mean"), [0.0] * 3),
        (PolicyLossConfig(surrogate="none"), [0.0] * 3),
    ):
        result = policy_loss(logprobs, old, advantages, sequence, config, old)
        assert result.clipped_N.tolist() == clipped
        torch.testing.assert_close(result.log_ratio_N, log_ratio)  # a token's, whatever the loss takes
        assert result.loss_N.requires_grad
        assert not any(each.requires_grad for each in (result.kl_N, result.clipped_N, result.log_ratio_N))


@pytest.mark.parametrize("ratio", ["token", "sequence_mean", "sequence_sum"])
def test_the_kl_term_takes_the_ratio_of_its_token_and_no_correction(ratio):
    """k3 of log pi - log pi_ref = log 2 is 1/2 + log 2 - 1; the tokens are twice and half as likely as before."""
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    old, reference = logprobs - torch.tensor([2.0, 0.5], dtype=torch.float64).log(), logprobs - math.log(2)
    config = PolicyLossConfig(ratio=ratio, kl_coef=0.1, kl_ratio=True)
    nothing, one_answer = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    result = policy_loss(logprobs, old, nothing, one_answer, config, reference, correction_N=torch.full((2,), 3.0))
    k3 = math.log(2) - 0.5
    assert result.loss_N.tolist() == pytest.approx([0.1 * 2.0 * k3, 0.1 * 0.5 * k3])


@pytest.mark.parametrize("far", [200.0, -200.0])
@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_straight_through"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "none"])
def test_a_policy_that_has_left_its_sampler_far_behind_gives_finite_numbers(surrogate, estimator, far):
    """e^200 is infinite in float32, and 0 times that is NaN: one such token would end the run."""
    logprobs = torch.tensor([-250.0, -250.0], requires_grad=True)
    old, advantages, sequence = logprobs.detach() - far, torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.long)
    config = PolicyLossConfig(surrogate=surrogate, kl_coef=0.1, kl_estimator=estimator, kl_ratio=True)
    result = policy_loss(logprobs, old, advantages, sequence, config, old)
    assert result.loss_N.isfinite().all()
    (gradient,) = torch.autograd.grad(result.loss_N.sum(), logprobs)
    assert gradient.isfinite().all()


def test_reinforce_needs_no_ratio():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    result = policy_loss(
        logprobs,
        torch.zeros(2),
        torch.tensor([3.0, -1.0]),
        torch.zeros(2, dtype=torch.long),
        PolicyLossConfig(surrogate="none"),
    )
    assert result.loss_N.tolist() == [3.0, -2.0]
    result.loss_N.sum().backward()
    assert logprobs.grad.tolist() == [-3.0, 1.0]


def test_kl_estimators_by_hand_and_by_their_expectation():
    # x = log 2: k1 = .6931, k2 = .2402, k3 = 1/2 + log 2 - 1 = .1931
    x = torch.tensor([math.log(2.0)], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    assert kl_divergence(x, zero, "k1").item() == pytest.approx(0.693147, abs=1e-6)
    assert kl_divergence(x, zero, "k2").item() == pytest.approx(0.240227, abs=1e-6)
    assert kl_divergence(x, zero, "k3").item() == pytest.approx(0.193147, abs=1e-6)
    # Over all outcomes of a distribution p, the mean of k1 and of k3 is KL(p || q) exactly; the gradient of E[k2] as a
    # loss on samples of p is the KL's, k1's is zero. k3_straight_through has k3's value and k2's gradient.
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    logp = logits.log_softmax(0)
    p = logp.exp()
    kl = (p * (logp - reference)).sum()
    (true_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    gradients = {}
    for estimator in ("k1", "k2", "k3", "k3_straight_through"):
        value = (p.detach() * kl_divergence(logp, reference, estimator)).sum()
        if estimator != "k2":
            assert value.item() == pytest.approx(kl.item())
        (gradients[estimator],) = torch.autograd.grad(value, logits, retain_graph=True)
    torch.testing.assert_close(gradients["k2"], true_gradient)
    torch.testing.assert_close(gradients["k3_straight_through"], true_gradient)
    assert gradients["k1"].abs().max() < 1e-12
    assert not torch.allclose(gradients["k3"], true_gradient, atol=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_straight_through"])
def test_a_kl_term_times_the_ratio_has_the_kls_gradient(estimator):
    """Exactly, over all outcomes, and drawn by another policy than the one that learns (`kl_ratio`)."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    logp = logits.log_softmax(0)
    (true_gradient,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)
    config = PolicyLossConfig(kl_coef=1.0, kl_estimator=estimator, kl_ratio=True)
    no_advantage, sequence = torch.zeros(3, dtype=torch.float64), torch.arange(3)
    result = policy_loss(logp, old, no_advantage, sequence, config, reference)
    (gradient,) = torch.autograd.grad((old.exp() * result.loss_N).sum(), logits)
    torch.testing.assert_close(gradient, true_gradient)


def test_sampler_correction_is_truncated():
    trainer, sampler = torch.log(torch.tensor([0.4, 0.1, 0.9])), torch.log(torch.tensor([0.1, 0.2, 0.9]))
    sequence = torch.tensor([0, 0, 1])
    assert sampler_correction(trainer, sampler, sequence, "token", 2.0).tolist() == pytest.approx([2.0, 0.5, 1.0])
    # sequence 0: 4 x 0.5 = 2
    whole = sampler_correction(trainer, sampler, sequence, "sequence_sum", 3.0)
    assert whole.tolist() == pytest.approx([2.0, 2.0, 1.0])


def test_value_loss_takes_the_larger_error():
    # V = 3, R = 1: plain (2)^2 / 2 = 2. Old value 5, clip 0.5 -> V kept at 4.5: (3.5)^2 / 2 = 6.125, the larger.
    one = torch.ones(1)
    assert value_loss(3 * one, 5 * one, one, None).item() == 2.0
    assert value_loss(3 * one, 5 * one, one, 0.5).item() == 6.125


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    # group 0: mean 1/2, unbiased deviation sqrt(4 x 1/4 / 3) = 0.57735
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    scaled = group_advantages(rewards, scale=True)
    assert scaled[0].tolist() == pytest.approx([expected, -expected, -expected, expected])
    assert scaled[1].tolist() == [0.0] * 4
    assert group_advantages(rewards, scale=False)[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages(rewards[:, :1], scale=True).tolist() == [[0.0], [0.0]]
    # leave one out: 1 - (0 + 0 + 1) / 3 = 2/3; 0 - (1 + 0 + 1) / 3 = -2/3
    assert leave_one_out_advantages(rewards)[0].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("answers", [3, 5, 6, 7, 12, 100])
def test_answers_that_earn_the_same_have_no_advantage(reward, answers):
    """Not 1e-13 either, by the rounding of a mean: the optimizer takes a whole step on the smallest gradient (B9)."""
    same = torch.full((1, answers), reward, dtype=torch.float64)
    assert not group_advantages(same, scale=True).any()
    assert not group_advantages(same, scale=False).any()
    assert not leave_one_out_advantages(same).any()
    assert not whiten(same[0]).any()


def test_whitening():
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)  # mean 3, variance (4 + 1 + 9) / 3 = 14/3
    sigma = math.sqrt(14 / 3)
    assert whiten(values).tolist() == pytest.approx([-2 / sigma, -1 / sigma, 3 / sigma], rel=1e-6)
    assert whiten(torch.ones(4)).tolist() == [0.0] * 4


def naive_gae(rewards, values, bootstrap, gamma, lam):
    advantages, following = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        next_value = values[t + 1] if t + 1 < len(rewards) else bootstrap
        following = rewards[t] + gamma * next_value - values[t] + gamma * lam * following
        advantages[t] = following
    return advantages


def test_generalized_advantages_equal_a_loop_per_response():
    generator = np.random.default_rng(0)
    S, L, gamma, lam = 5, 7, 0.97, 0.9
    lengths = np.array([7, 1, 3, 6, 2])
    rewards, values = generator.normal(size=(S, L)), generator.normal(size=(S, L))
    bootstrap = np.array([0.0, 1.5, 0.0, -0.7, 0.0])
    advantages, returns = generalized_advantages(
        *(torch.from_numpy(x) for x in (rewards, values, lengths, bootstrap)), gamma=gamma, lam=lam
    )
    for s, length in enumerate(lengths):
        expected = naive_gae(rewards[s, :length], values[s, :length], bootstrap[s], gamma, lam)
        np.testing.assert_allclose(advantages[s, :length], expected, rtol=1e-12)
        np.testing.assert_allclose(returns[s, :length], expected + values[s, :length], rtol=1e-12)
        assert not advantages[s, length:].any()
        assert not returns[s, length:].any()
    # By hand: r = (0, 1), V = (.5, .25), gamma = 1, lambda = .5:
    # A_1 = 1 - .25 = .75;  A_0 = .25 - .5 + .5 x .75 = .125
    by_hand, _ = generalized_advantages(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), torch.tensor([2]), torch.zeros(1), gamma=1.0, lam=0.5
    )
    assert by_hand.tolist() == [[0.125, 0.75]]


@pytest.mark.parametrize("wrong", [{"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}, {"kl_coef": -1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        PolicyLossConfig(**wrong)


@pytest.mark.parametrize("last", [{"clip_low": 0.0}, {"clip_low": 1.0}, {"clip_high": 0.0}, {"kl_coef": 0.0}])
def test_settings_at_the_end_of_their_range_are_taken(last):
    PolicyLossConfig(**last)
