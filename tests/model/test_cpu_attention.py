"""Attention in bf16 on a CPU: the formula in float64, its rounding in bf16, one operation to whoever looks on."""

import pytest
import torch
import torch.nn.functional as F

from minnow.model import cpu_attention
from minnow.model.cpu_attention import cpu_causal_attention

SHAPES = [
    # batch, length, query heads, key heads, head size
    (3, 5, 4, 4, 8),
    (2, 9, 6, 2, 16),
    (1, 12, 4, 1, 8),
    (5, 1, 2, 2, 4),
    (0, 5, 2, 2, 4),
    (2, 0, 2, 1, 4),
    (2, 8, 3, 3, 12),
]


def drawn(shape, dtype, seed=0):
    batch, length, heads, key_heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(batch, length, count, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]
    return inputs, torch.randn(batch, length, heads, size, generator=generator, dtype=torch.float64).to(dtype)


def torchs_attention(q, k, v):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


def output_and_gradients(attention, inputs, upstream):
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


@pytest.mark.parametrize("scores", [1, 200, cpu_attention.SCORES])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_causal_attention_forward_and_backward(monkeypatch, shape, scores):
    """In float64 against torch's own, with blocks and lots that end in the middle of everything."""
    monkeypatch.setattr(cpu_attention, "QUERIES", 4)
    monkeypatch.setattr(cpu_attention, "SCORES", scores)
    inputs, upstream = drawn(shape, torch.float64)
    ours = output_and_gradients(cpu_causal_attention, inputs, upstream)
    for a, b in zip(ours, output_and_gradients(torchs_attention, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert a.is_contiguous()


def test_whole_blocks_of_the_real_size():
    inputs, upstream = drawn((2, 2 * cpu_attention.QUERIES + 3, 2, 1, 8), torch.float64)
    ours = output_and_gradients(cpu_causal_attention, inputs, upstream)
    for a, b in zip(ours, output_and_gradients(torchs_attention, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_inputs_may_lie_anyhow_in_memory():
    (q, k, v), upstream = drawn((2, 9, 4, 2, 8), torch.float64)
    joined = torch.cat((q, k, v), dim=2).transpose(0, 1).contiguous().transpose(0, 1).detach().requires_grad_()
    queries, keys, values = joined.split((4, 2, 2), dim=2)
    output = cpu_causal_attention(queries, keys, values)
    (gradient,) = torch.autograd.grad(output, joined, upstream)
    expected = output_and_gradients(torchs_attention, [q, k, v], upstream)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(gradient, torch.cat(expected[1:], dim=2))


def test_rounding_in_bf16_is_that_of_its_products():
    """Against float64 on the same rounded inputs: half a percent, where torch's flash attention has a quarter."""
    inputs, upstream = drawn((4, 200, 4, 2, 64), torch.bfloat16)
    ours = output_and_gradients(cpu_causal_attention, inputs, upstream)
    exact = output_and_gradients(
        torchs_attention, [x.detach().double().requires_grad_() for x in inputs], upstream.double()
    )
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.008 * b.norm()


def test_the_keys_gradient_is_summed_over_blocks_in_float32(monkeypatch):
    """128 blocks of one query each: sums in bf16 would be off by percents."""
    monkeypatch.setattr(cpu_attention, "QUERIES", 1)
    inputs, upstream = drawn((1, 128, 1, 1, 16), torch.bfloat16)
    upstream = upstream.abs()
    ours = output_and_gradients(cpu_causal_attention, inputs, upstream)
    exact = output_and_gradients(
        torchs_attention, [x.detach().double().requires_grad_() for x in inputs], upstream.double()
    )
    assert (ours[3].double() - exact[3]).norm() < 0.004 * exact[3].norm()


def test_torch_accepts_it_as_an_operation():
    """Its shapes without values, and its gradient, as torch.compile and gradient checkpointing ask for them."""
    inputs, _ = drawn((2, 5, 4, 2, 8), torch.bfloat16)
    torch.library.opcheck(cpu_causal_attention, tuple(inputs))
