"""Distillation losses beside TRL's and torch's, in chunks beside whole, and from k tokens beside all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minnow.config import UserError
from minnow.objectives import distillation
from minnow.objectives.distillation import (
    DistillationLossConfig,
    divergence,
    linear_distillation,
    top_k_outcomes,
)

N, D, V = 37, 8, 50


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("name", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5), ("jsd", 0.1)])
def test_divergences_beside_trl(name: Any, beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits(0).requires_grad_(), logits(1)
    labels = torch.zeros(N, dtype=torch.long)
    labels[5:9] = -100
    expected = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    per_token = divergence(
        F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1), name, beta or 0.5
    )
    found = per_token[labels != -100].mean()
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def parts(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator)
    return hidden, weight, targets, weights, logits(7)


def whole(config: DistillationLossConfig, hidden: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    """Hinton's loss on the whole logits, the divergence of the teacher's tokens as its definition has it."""
    targets, weights, teacher = rest
    student = hidden @ weight.T
    s, t = (softened.softmax(1) for softened in (student[:, :V] / config.temperature, teacher / config.temperature))

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(1)

    mixture = config.jsd_beta * t + (1 - config.jsd_beta) * s
    soft = {
        "forward": kl(t, s),
        "reverse": kl(s, t),
        "jsd": config.jsd_beta * kl(t, mixture) + (1 - config.jsd_beta) * kl(s, mixture),
    }[config.divergence]
    losses = config.alpha * F.cross_entropy(student, targets, reduction="none")
    return (weights * (losses + (1 - config.alpha) * config.temperature**2 * soft)).sum()


@pytest.mark.parametrize(
    ("settings", "padding"),
    [({}, 0), ({"divergence": "reverse"}, 0), ({"divergence": "jsd"}, 0), ({"divergence": "jsd", "jsd_beta": 0.1}, 3)],
)
@pytest.mark.parametrize("chunk_size", [5, 37, 512])
def test_chunks_give_the_loss_and_gradients_of_the_whole(
    chunk_size: int, settings: dict[str, Any], padding: int
) -> None:
    """padding: rows of the student's head that the teacher's does not have."""
    config = DistillationLossConfig(alpha=0.3, temperature=2.0, **settings)
    hidden, weight, targets, weights, teacher = parts()
    hidden.requires_grad_()
    weight = torch.cat([weight, torch.ones(padding, D)]).requires_grad_()

    def chunk_of_teacher(chunk: slice) -> tuple[Tensor, None]:
        return F.log_softmax(teacher[chunk] / config.temperature, 1), None

    found = linear_distillation(
        config,
        hidden,
        weight,
        targets,
        weights,
        chunk_of_teacher,
        vocab_size=V if padding else None,
        chunk_size=chunk_size,
    )
    gradients = torch.autograd.grad(found.loss_sum, (hidden, weight))
    expected = whole(config, hidden, weight, targets, weights, teacher)
    torch.testing.assert_close(found.loss_sum, expected, rtol=1e-5, atol=1e-5)
    nll_sum = (weights * F.cross_entropy(hidden @ weight.T, targets, reduction="none")).sum()
    torch.testing.assert_close(found.nll_sum, nll_sum.detach(), rtol=1e-5, atol=1e-5)
    of_teacher = 0.3 * found.nll_sum + 0.7 * 2.0**2 * found.divergence_sum
    torch.testing.assert_close(of_teacher, expected.detach(), rtol=1e-5, atol=1e-4)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_never_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    heights: list[int] = []
    softmax = torch.log_softmax
    monkeypatch.setattr(distillation.torch, "log_softmax", lambda x, dim: heights.append(len(x)) or softmax(x, dim=dim))
    hidden, weight, targets, weights, teacher = parts()
    hidden.requires_grad_()
    found = linear_distillation(
        DistillationLossConfig(),
        hidden,
        weight,
        targets,
        weights,
        lambda chunk: (F.log_softmax(teacher[chunk], 1), None),
        chunk_size=8,
    )
    found.loss_sum.backward()
    assert heights
    assert max(heights) <= 8


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_k_tokens_and_the_rest(name: Any) -> None:
    """All tokens listed: the same as the whole. Fewer: never more, as joining outcomes cannot add divergence."""
    student, teacher = F.log_softmax(logits(0), 1), F.log_softmax(logits(1), 1)
    exact = divergence(student, teacher, name)
    previous = torch.zeros(N)
    for k in (1, 5, 20, V):
        ids = teacher.topk(k, dim=1).indices
        top = top_k_outcomes(teacher, ids)
        found = divergence(top_k_outcomes(student, ids), top, name)
        assert (found >= previous - 1e-5).all()
        previous = found
    torch.testing.assert_close(previous, exact, rtol=1e-4, atol=1e-4)
    assert (top.exp().sum(1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_a_rest_of_next_to_nothing_keeps_its_digits(name: Any) -> None:
    """What the listed tokens leave to one is below the digits of float32: each side in turn is as sure as that."""
    ids = torch.tensor([[0, 1]])
    sure = torch.tensor([[20.0, 19.0, -4.0, -5.0, -6.0]])
    for student, teacher in ((sure, torch.zeros(1, 5)), (torch.zeros(1, 5), sure)):
        outcomes = []
        for logits_NV in (student, teacher):
            p = logits_NV.double().softmax(1)
            outcomes.append(torch.cat([p[:, :2], p[:, 2:].sum(1, keepdim=True)], dim=1).log())
        student.requires_grad_()
        listed = [top_k_outcomes(F.log_softmax(logits_NV, 1), ids) for logits_NV in (student, teacher)]
        found = divergence(*listed, name)
        torch.testing.assert_close(found.double(), divergence(*outcomes, name), rtol=1e-4, atol=1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert gradient.isfinite().all()
        assert gradient[0, 2:].abs().max() > 0, "the rest is learnt too"


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    same = F.log_softmax(logits(3), 1)
    for name in ("forward", "reverse", "jsd"):
        assert divergence(same, same, name).abs().max() < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"alpha": 1.0}, {"temperature": 0.0}, {"jsd_beta": 1.0}, {"top_k": -1}])
def test_numbers_without_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="loss"):
        DistillationLossConfig(**settings)
