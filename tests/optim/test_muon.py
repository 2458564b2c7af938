"""Muon against torch's own and by hand."""

import math

import pytest
import torch

from minnow.optim import Muon

SHAPES = [(16, 16), (8, 24), (24, 8), (8, 24), (16, 16), (24, 8)]


def parameters(shapes=SHAPES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def newton_schulz_in_own_dtype(grad, ns_coefficients, ns_steps, eps):
    """torch's function, written for one matrix without its cast to bfloat16."""
    a, b, c = ns_coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.size(0) > grad.size(1) else x


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch without Muon")
@pytest.mark.parametrize("update_scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_equals_torchs_muon(monkeypatch, update_scale, dtype, tolerance):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz_in_own_dtype)
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    muon = Muon(
        ours,
        **options,
        momentum_warmup_steps=0,
        polynomial="quintic",
        update_scale=update_scale,
        orthogonalise_dtype=dtype,
    )
    reference = torch.optim.Muon(theirs, **options, adjust_lr_fn=update_scale)
    for step in range(5):
        for params, optimizer in ((ours, muon), (theirs, reference)):
            give_gradients(params, step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch without Muon")
def test_equals_torchs_muon_as_it_is_in_bfloat16():
    """Without a patch, torch iterates in bfloat16: one step's update agrees to its rounding."""
    ours, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    before = [p.detach().clone() for p in ours]
    muon = Muon(ours, lr=1.0, momentum_warmup_steps=0, polynomial="quintic", orthogonalise_dtype=torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=1.0, weight_decay=0.0)
    for params, optimizer in ((ours, muon), (theirs, reference)):
        give_gradients(params, 0)
        optimizer.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        assert (p - q).norm() < 0.04 * (q - start).norm()


def test_one_step_by_hand():
    # A 1 x 2 gradient (3, 4) of norm 5. The momentum buffer starts at 0, so the Nesterov update is the gradient times
    # a number and its direction is (0.6, 0.8). One quintic step on singular value 1: 3.4445 - 4.7750 + 2.0315 = 0.701.
    # original: s = sqrt(max(1, 1 / 2)) = 1. lr 0.1, weight decay 0.5: w <- (1 - 0.05) w - 0.1 * 0.701 * (0.6, 0.8).
    w = torch.nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    muon = Muon([w], lr=0.1, weight_decay=0.5, polynomial="quintic", newton_schulz_steps=1)
    w.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    muon.step()
    expected = torch.tensor([[0.95 - 0.0701 * 0.6, 1.9 - 0.0701 * 0.8]], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-12)


def test_scales_by_hand():
    # Tall 4 x 1: original sqrt(4 / 1) = 2; match_rms_adamw 0.2 sqrt(4) = 0.4. Wide 1 x 4: 1 and 0.4.
    from minnow.optim.muon import scale_of

    tall, wide = torch.zeros(4, 1), torch.zeros(1, 4)
    assert scale_of(tall, "original") == 2.0
    assert scale_of(wide, "original") == 1.0
    assert scale_of(tall, "match_rms_adamw") == pytest.approx(0.4)
    assert scale_of(wide, "match_rms_adamw") == pytest.approx(0.4)
    assert scale_of(torch.zeros(7, 4, 1), "original") == 2.0  # experts: the last two sides


def test_momentum_warms_up_linearly():
    # From 0.5 to 0.9 over 4 steps: 0.5, 0.6, 0.7, 0.8, 0.9, 0.9. With gradient 1 the buffer b <- mu b + (1 - mu).
    w = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    muon = Muon([w], momentum=0.9, momentum_start=0.5, momentum_warmup_steps=4)
    expected = 0.0
    for momentum in (0.5, 0.6, 0.7, 0.8, 0.9, 0.9):
        w.grad = torch.ones_like(w)
        muon.step()
        expected = momentum * expected + (1 - momentum)
        assert muon.state[w]["momentum_buffer"].item() == pytest.approx(expected, rel=1e-12)


def test_experts_are_orthogonalised_one_by_one():
    """A 3-D stack steps like its experts as single parameters, whatever else shares the batch."""
    stacks = parameters([(3, 8, 24), (2, 24, 8)])
    singles = [torch.nn.Parameter(m.detach().clone()) for stack in stacks for m in stack]
    together, apart = Muon(stacks, lr=0.1), [Muon([p], lr=0.1) for p in singles]
    for step in range(3):
        give_gradients(stacks, step)
        for p, gradient in zip(singles, [g for stack in stacks for g in stack.grad], strict=True):
            p.grad = gradient.clone()
        together.step()
        for optimizer in apart:
            optimizer.step()
    for got, want in zip([m for stack in stacks for m in stack], singles, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_small_stacks_and_one_large_stack_agree(monkeypatch):
    ours, others = parameters(), parameters()
    for params in (ours, others):
        give_gradients(params, 0)
    Muon(ours, lr=0.1).step()
    monkeypatch.setattr("minnow.optim.muon._STACK_ELEMENTS_CPU", 1)
    Muon(others, lr=0.1).step()
    for p, q in zip(ours, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_a_parameter_without_gradient_is_left_alone():
    used, idle = parameters([(4, 4), (4, 4)])
    before = idle.detach().clone()
    muon = Muon([used, idle], lr=0.1, weight_decay=0.5)
    give_gradients([used], 0)
    muon.step()
    assert torch.equal(idle, before)
    assert idle not in muon.state


def test_learns_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 8, generator=generator)
    inputs = torch.randn(64, 8, generator=generator)
    w = torch.nn.Parameter(torch.zeros(8, 8))
    muon = Muon([w], lr=0.1)
    losses = []
    for step in range(150):
        for group in muon.param_groups:
            group["lr"] = 0.1 * (1 - step / 150)
        loss = (inputs @ (w - target).T).square().mean()
        muon.zero_grad()
        loss.backward()
        muon.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert math.isfinite(losses[-1])
