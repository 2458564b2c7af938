"""Attention in bf16 on a CPU: the formula in float64, its rounding in bf16, one operation to whoever looks on."""

import pytest
import torch
from cpu_attention import in_dtype, output_and_gradients, torchs_attention
from torch import library

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
    assert output.is_contiguous()
    assert not queries.is_contiguous()
    (gradient,) = torch.autograd.grad(output, joined, upstream)
    expected = output_and_gradients(torchs_attention, [q, k, v], upstream)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(gradient, torch.cat(expected[1:], dim=2))


def test_rounding_in_bf16_is_that_of_its_products():
    """Against float64 on the same rounded inputs: half a percent, where torch's flash attention has a quarter."""
    inputs, upstream = drawn((4, 200, 4, 2, 64), torch.bfloat16)
    assert max(errors(inputs, upstream)) < 0.006


def test_what_scores_have_in_common_costs_no_digits():
    """Biases of queries and keys, as Qwen2 has them: scores of some 600, of which all but a few dozen are common."""
    (q, k, v), upstream = drawn((2, 200, 4, 2, 64), torch.float32)
    generator = torch.Generator().manual_seed(1)
    biased = [x.detach() + 12 * torch.randn(x.shape[2:], generator=generator) for x in (q, k)]
    inputs = [x.detach().bfloat16().requires_grad_() for x in (*biased, v)]
    scores = torch.einsum("bthd,bshd->bhts", inputs[0], inputs[1].repeat_interleave(2, dim=2)) / 8
    assert scores.abs().max() > 250
    assert max(errors(inputs, upstream.bfloat16())) < 0.08  # 0.5 where the common part is rounded with the rest


def errors(inputs, upstream):
    """Of output and gradients: the norm of what float64 makes different, over the norm."""
    ours = output_and_gradients(cpu_causal_attention, inputs, upstream)
    assert {x.dtype for x in ours} == {torch.bfloat16}
    exact = output_and_gradients(torchs_attention, *in_dtype(torch.float64, inputs, upstream))
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


def test_the_keys_gradient_is_summed_over_blocks_in_float32(monkeypatch):
    """128 blocks of one query each: sums in bf16 would be off by percents."""
    monkeypatch.setattr(cpu_attention, "QUERIES", 1)
    inputs, upstream = drawn((1, 128, 1, 1, 16), torch.bfloat16)
    upstream = upstream.abs()
    assert errors(inputs, upstream)[3] < 0.004


def test_what_is_held_at_once_has_a_bound():
    """Scores of a block, whatever the numbers of sequences, heads and tokens: short documents go many at a time, of a
    long one some key heads."""
    for batch, key_heads, group, length in [(512, 4, 2, 16), (8, 8, 1, 1024), (3, 2, 4, 5000), (1, 16, 1, 3000)]:
        q_BKGTd = torch.empty(batch, key_heads, group, length, 1, device="meta")
        lots = [q_BKGTd[lot] for lot in cpu_attention._lots(q_BKGTd)]
        assert sum(lot.numel() for lot in lots) == q_BKGTd.numel()
        rows = min(cpu_attention.QUERIES, length) * length
        held = [lot.shape[0] * lot.shape[1] * group * rows for lot in lots]
        assert max(held) <= max(cpu_attention.SCORES, group * rows)
        assert max(held) > cpu_attention.SCORES / 2 or group * rows > cpu_attention.SCORES / 2 or len(lots) == 1
    blocks = list(cpu_attention._blocks(300))
    assert blocks == [
        (slice(0, 128), slice(0, 128)),
        (slice(128, 256), slice(0, 256)),
        (slice(256, 300), slice(0, 300)),
    ]


@pytest.mark.parametrize("learnt", [(True, True, True), (True, False, False), (False, True, False)])
def test_torch_accepts_it_as_an_operation(learnt):
    """Its shapes and strides without values, and its gradients, as torch.compile and gradient checkpointing ask for
    them; of inputs that are parts of one tensor, not all of them learnt."""
    joined = torch.randn(2, cpu_attention.QUERIES + 3, 8, 8, dtype=torch.bfloat16)
    inputs = [x.detach().requires_grad_(learns) for x, learns in zip(joined.split((4, 2, 2), 2), learnt, strict=True)]
    library.opcheck(cpu_causal_attention, tuple(inputs))
