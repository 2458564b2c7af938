"""Preference losses beside TRL 1.16 (loss and gradient), and beside sums written out by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minnow.config import UserError
from minnow.objectives.preference import (
    PreferenceLossConfig,
    answer_sums,
    kto_loss,
    length_weights,
    odds_ratio_loss,
    preference_loss,
)
from minnow.objectives.stable import log1mexp

# Four answers (two pairs: TRL puts both chosen first) of 3, 6, 4 and 5 tokens behind a prompt of 3: once the chosen
# one is the longer, once the rejected one.
LENGTHS = torch.tensor([3, 6, 4, 5])
WIDTH = 9
REFERENCE = torch.tensor([-4.0, -2.0, -3.5, -1.5])


def padded_logprobs() -> tuple[Tensor, Tensor]:
    """Per-token log-probabilities [4, WIDTH - 1] and TRL's completion mask [4, WIDTH]; ours are rows 0, 2, 1, 3."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(4, WIDTH, dtype=torch.long)
    for row, length in enumerate(LENGTHS.tolist()):
        mask[row, 3 : 3 + length] = 1
    logprobs = -torch.rand(4, WIDTH - 1, generator=generator).mul(2) * mask[:, 1:]
    return logprobs, mask


class Accelerator:
    device = torch.device("cpu")
    num_processes = 1

    def gather_for_metrics(self, x: Tensor) -> Tensor:
        return x

    gather = gather_for_metrics


def trl_dpo(name: str, *, beta: float, smoothing: float = 0.0, alpha: float | None = None) -> tuple[float, Tensor]:
    """TRL's DPO loss of the padded answers and its gradient, both in our order of tokens."""
    from trl import DPOTrainer

    logprobs, mask = padded_logprobs()
    logprobs.requires_grad_()

    class Model:
        training = True

        def __call__(self, **_: Any) -> SimpleNamespace:
            zeros = torch.zeros_like(logprobs)
            return SimpleNamespace(
                log_probs=logprobs,
                logits=None,
                entropy=zeros,
                log_sum_sq_probs=None,
                mean_logits=zeros,
                is_top1=zeros.bool(),
                label_mask=mask[:, 1:].bool(),
                loss=None,
            )

    model = Model()
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        model=model,
        aux_loss_enabled=False,
        ld_alpha=alpha,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(discopop_tau=0.05),
        _total_train_tokens=0,
        _tp_size=1,
        state=SimpleNamespace(num_input_tokens_seen=0),
    )
    inputs = {
        "input_ids": torch.zeros(4, WIDTH, dtype=torch.long),
        "attention_mask": torch.ones(4, WIDTH, dtype=torch.long),
        "completion_mask": mask,
        "ref_chosen_logps": REFERENCE[:2],
        "ref_rejected_logps": REFERENCE[2:],
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    return float(loss.detach()), our_order(logprobs.grad, mask)


def our_order(values: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([values[row][mask[row, 1:].bool()] for row in (0, 2, 1, 3)])


def ours(config: PreferenceLossConfig, kl: float = 0.0) -> tuple[float, Tensor]:
    """Our mean loss over the pairs and its gradient."""
    logprobs, mask = padded_logprobs()
    logprobs_N = our_order(logprobs, mask).requires_grad_()
    lengths_A = LENGTHS[[0, 2, 1, 3]]
    answer_N = torch.arange(4).repeat_interleave(lengths_A)
    weights_N = length_weights(answer_N, 4, config.length_alpha)
    sums_A, plain_A = answer_sums(weights_N * logprobs_N, answer_N, 4), answer_sums(logprobs_N, answer_N, 4)
    reference_A = REFERENCE[[0, 2, 1, 3]] if config.needs_reference else torch.zeros(4)
    loss = preference_loss(config, sums_A, reference_A, lengths_A, plain_A, torch.tensor(kl)).mean()
    loss.backward()
    assert logprobs_N.grad is not None
    return float(loss.detach()), logprobs_N.grad


def assert_same(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


def test_simpo_has_a_beta_of_its_own_where_none_is_given() -> None:
    """At 0.1 its margin gamma / beta would be 10 nats a token, and nothing but an unlearnt answer is so unlikely."""
    logprobs_A, lengths_A = torch.tensor([-2.0, -6.0]), torch.tensor([4, 4])
    arguments = (logprobs_A, torch.zeros(2), lengths_A, logprobs_A)
    # d = -0.5 + 1.5 = 1; 2 d - 1 = 1; -log sigmoid(1) = 0.31326.
    assert preference_loss(PreferenceLossConfig(name="simpo"), *arguments).item() == pytest.approx(0.31326, abs=1e-5)
    dpo = preference_loss(PreferenceLossConfig(), *arguments)  # d = 4, beta 0.1: -log sigmoid(0.4) = 0.51302
    assert dpo.item() == pytest.approx(0.51302, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("sigmoid", {"name": "dpo", "beta": 0.3}, {}),
        ("sigmoid_norm", {"name": "dpo", "beta": 0.3, "average": True}, {}),
        ("hinge", {"name": "hinge", "beta": 0.7}, {}),
        ("ipo", {"name": "ipo", "beta": 0.4}, {}),
        ("robust", {"name": "robust", "beta": 0.3, "label_smoothing": 0.1}, {"smoothing": 0.1}),
        ("sigmoid", {"name": "dpo", "beta": 0.3, "length_alpha": 0.25}, {"alpha": 0.25}),
        ("ipo", {"name": "ipo", "beta": 0.3, "length_alpha": 0.5}, {"alpha": 0.5}),
    ],
)
def test_dpo_family_beside_trl(name: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    assert_same(ours(PreferenceLossConfig(**settings)), trl_dpo(name, beta=settings["beta"], **options))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_beside_trl(smoothing: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    logprobs, mask = padded_logprobs()
    logprobs.requires_grad_()
    averages = logprobs.sum(1) / LENGTHS
    trainer = SimpleNamespace(
        accelerator=Accelerator(), alpha=0.0, beta=2.0, simpo_gamma=0.8, loss_type="simpo", label_smoothing=smoothing
    )
    losses, _, _ = CPOTrainer.cpo_loss(trainer, averages[:2], averages[2:])
    losses.mean().backward()
    config = PreferenceLossConfig(name="simpo", beta=2.0, simpo_gamma=0.8, label_smoothing=smoothing)
    assert_same(ours(config), (float(losses.detach().mean()), our_order(logprobs.grad, mask)))


def test_orpo_beside_trl() -> None:
    from trl.experimental.orpo import ORPOTrainer

    logprobs, mask = padded_logprobs()
    logprobs.requires_grad_()
    averages = logprobs.sum(1) / LENGTHS
    losses, *_ = ORPOTrainer.odds_ratio_loss(
        SimpleNamespace(accelerator=Accelerator(), beta=0.2), averages[:2], averages[2:]
    )
    # TRL adds the loss of the chosen answers apart; the paper's, equation 6, is the mean over an answer's tokens.
    expected = -losses.mean() - averages[:2].mean()
    expected.backward()
    assert_same(
        ours(PreferenceLossConfig(name="orpo", beta=0.2)), (float(expected.detach()), our_order(logprobs.grad, mask))
    )


@pytest.mark.parametrize("kl", [0.0, 0.6])
def test_kto_beside_trl(kl: float) -> None:
    from trl import KTOTrainer

    logprobs, mask = padded_logprobs()
    logprobs.requires_grad_()

    class Model:
        training = True

        def __call__(self, **_: Any) -> SimpleNamespace:
            zeros = torch.zeros_like(logprobs)
            return SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros)

    model = Model()
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        model=model,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda *_: torch.full((4,), kl - 3.0),
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.9,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = {
        "input_ids": torch.zeros(4, WIDTH, dtype=torch.long),
        "attention_mask": torch.ones(4, WIDTH, dtype=torch.long),
        "completion_mask": mask,
        "label": torch.tensor([True, True, False, False]),
        "ref_logps": REFERENCE,
        "ref_KL_logps": torch.full((4,), -3.0),
    }
    loss = KTOTrainer._compute_loss(trainer, model, batch, False)
    loss.backward()
    config = PreferenceLossConfig(name="kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.9)
    assert_same(ours(config, kl), (float(loss.detach()), our_order(logprobs.grad, mask)))


def naive(config: PreferenceLossConfig, kl: float) -> tuple[float, Tensor]:
    """The mean loss of the pairs and its gradient: token by token in float64, nothing taken from our code."""
    logprobs, mask = padded_logprobs()
    answers = [logprobs[row][mask[row, 1:].bool()].double().requires_grad_() for row in (0, 2, 1, 3)]
    references = REFERENCE[[0, 2, 1, 3]].double()
    beta, e, losses = config.chosen_beta, config.label_smoothing, []
    for pair in range(2):
        both = answers[2 * pair : 2 * pair + 2]
        shorter = min(len(both[0]), len(both[1]))
        x = []  # what the loss compares, chosen and rejected
        for side, tokens in enumerate(both):
            value = torch.zeros((), dtype=torch.float64)
            for place, token in enumerate(tokens):
                value = value + (token if place < shorter else config.length_alpha * token)
            if config.name not in ("simpo", "orpo"):
                value = value - references[2 * pair + side]
            if config.average or config.name in ("ipo", "simpo", "orpo"):
                value = value / len(tokens)
            x.append(value)
        d = x[0] - x[1]

        def log_sigmoid(z: Tensor) -> Tensor:
            return -torch.log(1 + torch.exp(-z))

        if config.name == "dpo":
            loss = -(1 - e) * log_sigmoid(beta * d) - e * log_sigmoid(-beta * d)
        elif config.name == "robust":
            loss = (-(1 - e) * log_sigmoid(beta * d) + e * log_sigmoid(-beta * d)) / (1 - 2 * e)
        elif config.name == "hinge":
            loss = torch.clamp(1 - beta * d, min=0)
        elif config.name == "ipo":
            loss = (d - 1 / (2 * beta)) ** 2
        elif config.name == "simpo":
            z = beta * d - config.simpo_gamma
            loss = -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)
        elif config.name == "orpo":
            odds = [torch.exp(value) / (1 - torch.exp(value)) for value in x]
            loss = -beta * log_sigmoid(torch.log(odds[0] / odds[1]))
        else:
            chosen = config.desirable_weight * (1 - 1 / (1 + torch.exp(-beta * (x[0] - kl))))
            loss = (chosen + config.undesirable_weight * (1 - 1 / (1 + torch.exp(-beta * (kl - x[1]))))) / 2
        nll_weight = config.nll_weight if config.nll_weight is not None else float(config.name == "orpo")
        losses.append(loss - nll_weight * both[0].sum() / len(both[0]))
    total = torch.stack(losses).mean()
    total.backward()
    return float(total.detach()), torch.cat([answer.grad for answer in answers]).float()  # type: ignore[misc]


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "dpo", "beta": 0.3},
        {"name": "dpo", "beta": 0.3, "average": True},
        {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1},
        {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1, "average": True, "length_alpha": 0.5},
        {"name": "robust", "beta": 0.3, "label_smoothing": 0.2},
        {"name": "robust", "beta": 0.3, "label_smoothing": 0.2, "average": True},
        {"name": "hinge", "beta": 0.2},
        {"name": "hinge", "beta": 0.2, "average": True},
        {"name": "ipo", "beta": 0.4},
        {"name": "simpo", "beta": 2.0, "simpo_gamma": 0.8},
        {"name": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "label_smoothing": 0.2},
        {"name": "orpo", "beta": 0.2},
        {"name": "kto", "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.9},
        # The chosen answer's own loss is the plain mean over its tokens, whatever the loss makes of lengths.
        {"name": "dpo", "beta": 0.3, "nll_weight": 0.7},
        {"name": "dpo", "beta": 0.3, "nll_weight": 0.7, "length_alpha": 0.25},
        {"name": "ipo", "beta": 0.3, "nll_weight": 1.0, "length_alpha": 0.0},
        {"name": "orpo", "beta": 0.2, "length_alpha": 0.5},
        {"name": "kto", "beta": 0.3, "nll_weight": 0.5},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_loss_beside_a_naive_loop(settings: dict[str, Any]) -> None:
    config = PreferenceLossConfig(**settings)
    kl = 0.6 if config.name == "kto" else 0.0
    assert_same(ours(config, kl), naive(config, kl))


def test_conservative_dpo_is_the_expected_loss_under_flipped_labels() -> None:
    """cDPO with smoothing e: each pair is right with probability 1 - e and the other way round with e."""
    right = ours(PreferenceLossConfig(beta=0.5))
    logprobs, _ = padded_logprobs()
    d = [float(v) for v in (logprobs.sum(1) - REFERENCE)[[0, 1]] - (logprobs.sum(1) - REFERENCE)[[2, 3]]]
    flipped = sum(math.log1p(math.exp(0.5 * x)) for x in d) / 2
    smoothed = ours(PreferenceLossConfig(beta=0.5, label_smoothing=0.1))
    assert smoothed[0] == pytest.approx(0.9 * right[0] + 0.1 * flipped, rel=1e-6)


def test_robust_dpo_is_unbiased() -> None:
    """With labels flipped at rate e, the expected robust loss is DPO's loss on the true labels."""
    config = PreferenceLossConfig(name="robust", beta=0.5, label_smoothing=0.2)
    sums_A, reference_A = torch.tensor([-3.0, -4.0]), torch.tensor([-3.5, -3.0])
    lengths_A = torch.tensor([4, 4])
    straight = float(preference_loss(config, sums_A, reference_A, lengths_A, sums_A))
    flipped = float(preference_loss(config, sums_A.flip(0), reference_A.flip(0), lengths_A, sums_A.flip(0)))
    plain = float(preference_loss(PreferenceLossConfig(beta=0.5), sums_A, reference_A, lengths_A, sums_A))
    assert 0.8 * straight + 0.2 * flipped == pytest.approx(plain, rel=1e-6)


def test_a_model_that_is_its_reference_loses_log_two() -> None:
    config = PreferenceLossConfig(beta=0.1)
    sums_A = torch.tensor([-3.0, -9.0])
    assert float(preference_loss(config, sums_A, sums_A, torch.tensor([2, 5]), sums_A)) == pytest.approx(math.log(2))


def test_length_weights() -> None:
    """Pairs of 2 and 4 tokens, and of 3 and 1: what lies beyond the shorter one weighs alpha."""
    answer_N = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 3])
    assert length_weights(answer_N, 4, 0.5).tolist() == [1, 1, 1, 1, 0.5, 0.5, 1, 0.5, 0.5, 1]


def test_log_odds_stay_finite_with_their_gradients_at_both_ends() -> None:
    """An answer that is nearly certain (log p ~ 0) or nearly impossible must not turn the gradient into NaN."""
    x = torch.tensor([-1e-30, -1e-6, -math.log(2), -50.0, 0.0], requires_grad=True)
    assert torch.isfinite(log1mexp(x)).all()
    values = torch.tensor([-1e-6, -0.1, -1.0, -5.0, -20.0])  # each end needs a formula of its own in float32
    expected = torch.log1p(-torch.exp(values.double())).float()
    torch.testing.assert_close(log1mexp(values), expected, rtol=1e-5, atol=0)
    loss = odds_ratio_loss(x, torch.full((5,), -1.0), 0.1).sum()
    loss.backward()
    assert x.grad is not None
    assert torch.isfinite(loss)
    assert not x.grad.isnan().any()


def test_the_better_answer_rises_and_the_worse_one_falls() -> None:
    for name in ("dpo", "robust", "hinge", "ipo", "simpo", "orpo", "kto"):
        _, gradient_N = ours(PreferenceLossConfig(name=name, beta=0.1), kl=0.1)  # type: ignore[arg-type]
        chosen, rejected = gradient_N[:3], gradient_N[3:7]
        assert (chosen < 0).all(), name
        assert (rejected > 0).all(), name


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0},
        {"label_smoothing": 0.5},
        {"name": "ipo", "label_smoothing": 0.1},
        {"length_alpha": 1.5},
        {"nll_weight": -0.1},
        {"name": "kto", "desirable_weight": -1.0},
        {"name": "kto", "undesirable_weight": math.nan},
        {"name": "kto", "average": True},
    ],
)
def test_numbers_without_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="loss"):
        PreferenceLossConfig(**settings)


def test_hand_made_dpo() -> None:
    """d = (-2 + 3) - (-4 + 2) = 3; beta 0.5: -log sigmoid(1.5) = log(1 + e^-1.5) = 0.201413."""
    sums_A = torch.tensor([-2.0, -4.0])
    loss = preference_loss(
        PreferenceLossConfig(beta=0.5), sums_A, torch.tensor([-3.0, -2.0]), torch.tensor([1, 1]), sums_A
    )
    assert float(loss) == pytest.approx(0.2014133, abs=1e-6)
    assert float(loss) == pytest.approx(float(-F.logsigmoid(torch.tensor(1.5))))


def test_ktos_reference_point_is_not_below_zero_and_not_learnt() -> None:
    ratios_A, desirable_A = torch.tensor([0.5, -0.3]), torch.tensor([True, False])

    def loss(kl: Tensor) -> Tensor:
        return kto_loss(ratios_A, desirable_A, kl, 0.3, (1.0, 1.0))

    kl = torch.tensor(0.4, requires_grad=True)
    assert torch.equal(loss(torch.tensor(-0.7)), loss(torch.tensor(0.0)))
    assert not torch.equal(loss(kl), loss(torch.tensor(0.0)))
    assert not loss(kl).requires_grad
