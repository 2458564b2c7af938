"""The chunked loss against full logits, against torch's own, and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from minnow.objectives import bits_per_byte, linear_cross_entropy, token_logprobs
from minnow.objectives.lm import chunk_tokens


def problem(num_tokens=23, hidden=8, vocab=17, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight_VD = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype)
    targets_N = torch.randint(vocab, (num_tokens,), generator=generator)
    weights_N = torch.rand(num_tokens, generator=generator, dtype=torch.float64).to(dtype)
    weights_N[::3] = 0.0
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_(), targets_N, weights_N


def naive(hidden_ND, weight_VD, targets_N, weights_N, z_loss):
    """All logits at once, in the textbook's form."""
    logits_NV = hidden_ND @ weight_VD.T
    nll_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    z_N = torch.logsumexp(logits_NV, dim=1).square()
    return (weights_N * nll_N).sum(), z_loss * (weights_N * z_N).sum()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 16, 100])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_equals_full_logits_in_float64(chunk_size, z_loss):
    hidden, weight, targets, weights = problem()
    ours = linear_cross_entropy(hidden, weight, targets, weights, z_loss=z_loss, chunk_size=chunk_size)
    nll_sum, z_sum = naive(hidden, weight, targets, weights, z_loss)
    torch.testing.assert_close(ours.nll_sum, nll_sum.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.z_loss_sum, z_sum.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.loss_sum, nll_sum + z_sum, rtol=1e-12, atol=1e-12)
    expected = gradients((nll_sum + z_sum) * 0.37, hidden, weight)
    for got, want in zip(gradients(ours.loss_sum * 0.37, hidden, weight), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    hidden, weight, targets, weights = problem(num_tokens=7)

    def loss(h, w):
        return linear_cross_entropy(h, w, targets, weights, z_loss=0.2, chunk_size=3).loss_sum

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: loss(h, weight.detach()), (hidden,))
    assert torch.autograd.gradcheck(lambda w: loss(hidden.detach(), w), (weight,))


def test_hand_derived_values():
    # Logits (0, ln 3): softmax (1/4, 3/4), Z = ln 4. Target 0, weight 2: nll 2 ln 4; z-loss 0.5 * 2 * (ln
    # 4)^2. d/dlogits = 2 ((1 + 2 * 0.5 * ln 4) (1/4, 3/4) - (1, 0)).
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    result = linear_cross_entropy(
        hidden, weight, torch.tensor([0]), torch.tensor([2.0], dtype=torch.float64), z_loss=0.5
    )
    assert result.nll_sum.item() == pytest.approx(2 * math.log(4))
    assert result.z_loss_sum.item() == pytest.approx(math.log(4) ** 2)
    result.loss_sum.backward()
    first = 2 * ((1 + math.log(4)) / 4 - 1)
    second = 2 * (1 + math.log(4)) * 3 / 4
    torch.testing.assert_close(weight.grad, torch.tensor([[first, 0.0], [second, 0.0]], dtype=torch.float64))
    assert hidden.grad[0, 0].item() == pytest.approx(second * math.log(3))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch without F.linear_cross_entropy")
def test_equals_torchs_linear_cross_entropy():
    hidden, weight, targets, _ = problem()
    ours = linear_cross_entropy(hidden, weight, targets, torch.ones(len(targets)), chunk_size=4).loss_sum
    theirs = F.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_float32_close_to_float64():
    hidden, weight, targets, weights = problem(num_tokens=200, hidden=32, vocab=300)
    exact = linear_cross_entropy(hidden, weight, targets, weights, z_loss=1e-3)
    want = gradients(exact.loss_sum, hidden, weight)
    single = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    ours = linear_cross_entropy(*single, targets, weights.float(), z_loss=1e-3, chunk_size=64)
    assert ours.loss_sum.dtype == torch.float32
    torch.testing.assert_close(ours.loss_sum.double(), exact.loss_sum, rtol=1e-5, atol=0)
    for got, expected in zip(gradients(ours.loss_sum, *single), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_bfloat16_hidden_with_a_float32_master_weight(z_loss):
    """Sums and the master's gradient are float32, and as near as products in bfloat16 allow."""
    hidden, weight, targets, weights = problem(num_tokens=200, hidden=32, vocab=300)
    hidden_16 = hidden.detach().bfloat16().requires_grad_()
    master = weight.detach().float().requires_grad_()
    ours = linear_cross_entropy(hidden_16, master, targets, weights.float(), z_loss=z_loss, chunk_size=64)
    assert ours.loss_sum.dtype == ours.nll_sum.dtype == torch.float32
    ours.loss_sum.backward()
    assert hidden_16.grad.dtype == torch.bfloat16
    assert master.grad.dtype == torch.float32
    exact_hidden = hidden_16.detach().double().requires_grad_()
    exact_weight = master.detach().bfloat16().double().requires_grad_()
    nll_sum, z_sum = naive(exact_hidden, exact_weight, targets, weights, z_loss)
    want_hidden, want_weight = gradients(nll_sum + z_sum, exact_hidden, exact_weight)
    assert ours.loss_sum.item() == pytest.approx((nll_sum + z_sum).item(), rel=3e-3)
    assert (hidden_16.grad.double() - want_hidden).norm() < 0.02 * want_hidden.norm()
    assert (master.grad.double() - want_weight).norm() < 0.02 * want_weight.norm()


def test_weight_zero_positions_are_never_looked_at():
    """Filler may hold any target and any hidden state, and its gradient is exactly zero."""
    hidden, weight, targets, weights = problem()
    spoilt = hidden.detach().clone()
    spoilt[weights == 0] = torch.nan
    spoilt.requires_grad_()
    filler = torch.where(weights == 0, -100, targets)
    clean = linear_cross_entropy(hidden, weight, targets, weights, z_loss=0.1, chunk_size=4).loss_sum
    ours = linear_cross_entropy(spoilt, weight, filler, weights, z_loss=0.1, chunk_size=4).loss_sum
    assert ours.item() == clean.item()
    got_hidden, got_weight = gradients(ours, spoilt, weight)
    want_hidden, want_weight = gradients(clean, hidden, weight)
    assert torch.equal(got_hidden, want_hidden)
    assert torch.equal(got_weight, want_weight)
    assert torch.count_nonzero(got_hidden[weights == 0]) == 0


def test_places_that_are_known_are_not_looked_for(monkeypatch):
    """To look for them on a GPU, the host would have to wait for it."""
    hidden, weight, targets, weights = problem()
    known = weights.nonzero().squeeze(1)
    expected = linear_cross_entropy(hidden, weight, targets, weights, chunk_size=4).loss_sum
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("it looked"))
    ours = linear_cross_entropy(hidden, weight, targets, weights, chunk_size=4, supervised_S=known).loss_sum
    assert ours.item() == expected.item()
    for got, wanted in zip(gradients(ours, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_nothing_selected_gives_zero_loss_and_zero_gradients(num_tokens):
    hidden, weight, targets, _ = problem(num_tokens=num_tokens)
    result = linear_cross_entropy(hidden, weight, targets, torch.zeros(num_tokens), z_loss=0.1)
    result.loss_sum.backward()
    assert result.loss_sum.item() == 0.0
    assert hidden.grad.shape == hidden.shape
    assert torch.count_nonzero(hidden.grad) == 0
    assert torch.count_nonzero(weight.grad) == 0


def test_forward_only_gives_the_same_sums():
    hidden, weight, targets, weights = problem()
    trained = linear_cross_entropy(hidden, weight, targets, weights, z_loss=0.1, chunk_size=4)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, targets, weights, z_loss=0.1, chunk_size=4)
    assert not evaluated.loss_sum.requires_grad
    assert [x.item() for x in evaluated] == [x.item() for x in trained]


def test_only_the_loss_sum_has_a_gradient():
    """The gradient is made for loss_sum; backward through the two metrics must fail, not be silently
    wrong."""
    hidden, weight, targets, weights = problem()
    result = linear_cross_entropy(hidden, weight, targets, weights, z_loss=0.1)
    assert result.loss_sum.requires_grad
    assert not result.nll_sum.requires_grad
    assert not result.z_loss_sum.requires_grad


def test_a_second_backward_repeats_the_gradient():
    hidden, weight, targets, weights = problem()
    loss = linear_cross_entropy(hidden, weight, targets, weights).loss_sum
    first = torch.autograd.grad(loss * 3.0, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 3.0, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    result = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]), torch.ones(2))
    # First row: logits (1e4, -1e4), target the smaller: 2e4 nats. Second: the other way round, 0.
    assert result.nll_sum.item() == pytest.approx(2e4)
    result.loss_sum.backward()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.slow
def test_compiled_softmax_gives_the_same():
    hidden, weight, targets, weights = problem(num_tokens=60, dtype=torch.float32)
    for z_loss in (0.0, 0.1):
        eager = linear_cross_entropy(hidden, weight, targets, weights, z_loss=z_loss, chunk_size=16)
        compiled = linear_cross_entropy(hidden, weight, targets, weights, z_loss=z_loss, chunk_size=16, compiled=True)
        torch.testing.assert_close(compiled.loss_sum, eager.loss_sum)
        for got, want in zip(
            gradients(compiled.loss_sum, hidden, weight), gradients(eager.loss_sum, hidden, weight), strict=True
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_token_logprobs_equal_log_softmax(chunk_size):
    hidden, weight, targets, upstream = problem()
    ours = token_logprobs(hidden, weight, targets, chunk_size=chunk_size)
    theirs = torch.log_softmax(hidden @ weight.T, dim=1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    got = gradients((ours * upstream).sum(), hidden, weight)
    want = gradients((theirs * upstream).sum(), hidden, weight)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


def test_a_chunk_is_what_keeps_a_device_busy():
    # 2^25 logits in whole 128s: 40 x 128 of 5,242 tokens, 8 x 128 of 1,048, and never less than on a CPU.
    assert [chunk_tokens(torch.device("cuda"), vocab) for vocab in (6400, 32_000, 150_000)] == [5120, 1024, 512]
    assert chunk_tokens(torch.device("cpu"), 6400) == 512


def test_token_logprobs_gradcheck_and_empty():
    hidden, weight, targets, _ = problem(num_tokens=7)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, chunk_size=3), (hidden, weight))
    empty = token_logprobs(hidden[:0], weight, targets[:0])
    assert empty.shape == (0,)
    empty.sum().backward()
    assert torch.count_nonzero(weight.grad) == 0


def test_token_logprobs_of_bfloat16_are_float32():
    """And as exact as that: of logits which bfloat16 holds, only the sums over the vocabulary could be rounded."""
    hidden = torch.randint(-2, 3, (40, 8), generator=torch.Generator().manual_seed(0)).double()
    weight = torch.randint(-2, 3, (50, 8), generator=torch.Generator().manual_seed(1)).double()
    targets = torch.randint(50, (40,), generator=torch.Generator().manual_seed(2))
    master = weight.float().requires_grad_()
    logprobs = token_logprobs(hidden.bfloat16(), master, targets)
    assert logprobs.dtype == torch.float32
    exact = torch.log_softmax(hidden @ weight.T, 1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=1e-5)
    sums = linear_cross_entropy(hidden.bfloat16(), master, targets, torch.ones(40))
    assert sums.nll_sum.item() == pytest.approx(-exact.sum().item(), rel=1e-6)
    logprobs.sum().backward()
    assert master.grad.dtype == torch.float32


@pytest.mark.parametrize("loss", ["linear_cross_entropy", "token_logprobs"])
def test_the_heads_gradient_is_added_up_over_chunks_in_float32(loss):
    """A token 1,000 times, one a chunk, has 1,000 times its gradient: bfloat16 cannot count beyond 256."""
    hidden, weight, targets, _ = problem(num_tokens=1)
    master = weight.detach().float().requires_grad_()

    def gradient(times):
        tokens = hidden.detach().bfloat16().expand(times, -1), master, targets.expand(times)
        if loss == "token_logprobs":
            total = token_logprobs(*tokens, chunk_size=1).sum()
        else:
            total = linear_cross_entropy(*tokens, torch.ones(times), chunk_size=1).loss_sum
        return torch.autograd.grad(total, master)[0]

    torch.testing.assert_close(gradient(1000), 1000 * gradient(1), rtol=1e-4, atol=1e-4)


def test_bits_per_byte():
    # 8 nats over 4 bytes: 2 nats a byte = 2 / ln 2 = 2.885 bits.
    assert bits_per_byte(8.0, 4.0) == pytest.approx(2.8853900817779268)
    # A uniform guess over 256 values costs 8 bits a byte.
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8.0)
