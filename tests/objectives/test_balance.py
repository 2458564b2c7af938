"""The balance losses against transformers, torch and the papers' formulas in a plain float64 loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from minnow.objectives.balance import (
    bias_step,
    expert_counts,
    kl_to_uniform,
    kl_to_uniform_slope,
    load_balance_loss,
    load_balance_slope,
    sequence_balance_sum,
)


def routed(tokens: int, experts: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, probabilities (with gradient) and choices of an uneven router."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) + torch.linspace(0, 2, experts)
    probabilities = logits.softmax(-1).requires_grad_()
    return logits, probabilities, probabilities.topk(k, dim=-1).indices


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (8, 2), (5, 5)])
def test_load_balance_is_transformers(experts, k):
    """Theirs counts each token's k choices in full: k times ours."""
    logits, probabilities, chosen = routed(200, experts, k)
    ours = load_balance_loss(expert_counts(chosen, experts), probabilities.sum(0).double())
    theirs = load_balancing_loss_func((logits,), experts, k)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()) / k, rel=1e-5)


def test_load_balance_by_hand():
    # Three of four choices on expert 0, mean probabilities 0.6 and 0.4: 2 (0.75 * 0.6 + 0.25 * 0.4) = 1.1.
    loss = load_balance_loss(torch.tensor([3.0, 1.0]), torch.tensor([2.4, 1.6]))
    assert float(loss) == pytest.approx(1.1)
    assert float(load_balance_loss(torch.ones(2, 4), torch.ones(2, 4)).sum()) == pytest.approx(2.0)  # even: 1 a layer


def test_kl_is_torchs():
    _, probabilities, _ = routed(200, 6, 2)
    means = probabilities.mean(0)
    expected = F.kl_div(means.log(), torch.full((6,), 1 / 6), reduction="sum")
    assert float(kl_to_uniform(probabilities.sum(0))) == pytest.approx(float(expected), rel=1e-5)
    assert float(kl_to_uniform(torch.ones(6))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["load", "kl"])
def test_slopes_give_the_gradient_in_parts(kind):
    """Two halves with the whole batch's slopes have together the gradient of the loss over the whole batch."""
    _, probabilities, chosen = routed(100, 5, 2)
    counts = expert_counts(chosen, 5).float()
    sums = probabilities.sum(0)
    loss = load_balance_loss(counts, sums) if kind == "load" else kl_to_uniform(sums)
    # The probabilities of a token sum to 1, so only differences between experts count: take the mean out.
    expected = centred(torch.autograd.grad(loss, probabilities)[0])
    slope = load_balance_slope(counts) if kind == "load" else kl_to_uniform_slope(sums.detach())
    parts = [(slope * half.sum(0)).sum() / 100 for half in probabilities.split([30, 70])]
    got = centred(torch.autograd.grad(sum(parts), probabilities)[0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().max() > 1e-4


def centred(gradient: torch.Tensor) -> torch.Tensor:
    return gradient - gradient.mean(-1, keepdim=True)


def test_sequence_balance_is_the_papers_formula():
    _, probabilities, chosen = routed(30, 4, 2)
    pieces = torch.tensor([0] * 7 + [1] * 1 + [3] * 22)  # piece 2 is filler: none of its tokens is here
    expected = 0.0
    for piece in (0, 1, 3):
        tokens = (pieces == piece).nonzero().flatten().tolist()
        length = len(tokens)
        for expert in range(4):
            choices = sum(int(expert in chosen[t].tolist()) for t in tokens)
            f = 4 / (2 * length) * choices
            mean = sum(float(probabilities[t, expert]) for t in tokens) / length
            expected += length * f * mean
    assert float(sequence_balance_sum(probabilities, chosen, pieces)) == pytest.approx(expected, rel=1e-5)
    # A document counts by its tokens, so that cutting the batch between documents changes nothing. No tokens count 0.
    parts = [(0, 8), (8, 30), (30, 30)]
    summed = sum(sequence_balance_sum(probabilities[a:b], chosen[a:b], pieces[a:b]) for a, b in parts)
    assert float(summed) == pytest.approx(expected, rel=1e-5)


def test_bias_step():
    # The mean of 6, 1 and 2 is 3, of which one has more and two have less.
    counts = torch.tensor([[5.0, 1.0, 3.0], [2.0, 2.0, 2.0], [6.0, 1.0, 2.0]])
    assert bias_step(counts).tolist() == [[-1, 1, 0], [0, 0, 0], [-1, 1, 1]]
