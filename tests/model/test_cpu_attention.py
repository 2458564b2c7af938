"""Attention in bf16 on a CPU: the formula in float64, its rounding in bf16, one operation to whoever looks on."""

from pathlib import Path

import pytest
import torch
from cpu_attention import in_dtype, output_and_gradients, torchs_attention
from torch import library

from minnow.model import cpp, cpu_attention
from minnow.model.cpu_attention import attention_and_denominators, cpu_causal_attention

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


@pytest.fixture(params=["blocks", "C++", "C++ without torch's products"])
def implementation(monkeypatch, request):
    """Every way in which bf16 may go."""
    kernel = None
    if request.param == "C++":
        kernel = cpu_attention.kernel()
    elif request.param != "blocks":
        kernel = cpp.load_cpp(Path(cpu_attention.__file__).with_suffix(".cpp"), "PLAIN_PRODUCTS")
    if kernel is None and request.param != "blocks":
        pytest.skip("no C++ compiler, or torch multiplies no blocks of bf16 on this processor")
    monkeypatch.setattr(cpu_attention, "kernel", lambda: kernel)
    return request.param


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


LENGTHS = [7, 16, 33, 77, 128, 129, 200, 300]


@pytest.mark.parametrize("shape", [(2, 4, 2, 64), (1, 3, 3, 10), (2, 6, 1, 32), (3, 2, 2, 96), (1, 6, 2, 16)])
def test_rounding_in_bf16_is_that_of_its_products(implementation, shape):
    """Against float64 on the same rounded inputs, in lengths that end in the middle of everything: half a percent in
    blocks, a quarter with scores in float32, as torch's flash attention has them."""
    batch, heads, key_heads, size = shape
    for length in LENGTHS:
        inputs, upstream = drawn((batch, length, heads, key_heads, size), torch.bfloat16)
        assert max(errors(inputs, upstream)) < (0.009 if implementation == "blocks" else 0.0045), length


def test_one_token_sees_itself(implementation):
    inputs, upstream = drawn((3, 1, 4, 2, 16), torch.bfloat16)
    output, grad_q, grad_k, grad_v = output_and_gradients(cpu_causal_attention, inputs, upstream)
    values = inputs[2].repeat_interleave(2, dim=2)
    torch.testing.assert_close(output, values)
    torch.testing.assert_close(grad_v, upstream.unflatten(2, (2, 2)).sum(3))
    torch.testing.assert_close(
        (grad_q, grad_k), (torch.zeros_like(grad_q), torch.zeros_like(grad_k)), rtol=0, atol=1e-5
    )


def test_what_scores_have_in_common_costs_no_digits(implementation):
    """Biases of queries and keys, as Qwen2 has them: scores of some 600, of which all but a few dozen are common."""
    (q, k, v), upstream = drawn((2, 200, 4, 2, 64), torch.float32)
    generator = torch.Generator().manual_seed(1)
    biased = [x.detach() + 12 * torch.randn(x.shape[2:], generator=generator) for x in (q, k)]
    inputs = [x.detach().bfloat16().requires_grad_() for x in (*biased, v)]
    scores = torch.einsum("bthd,bshd->bhts", inputs[0], inputs[1].repeat_interleave(2, dim=2)) / 8
    assert scores.abs().max() > 250
    # 0.5 where the common part is rounded with the rest
    assert max(errors(inputs, upstream.bfloat16())) < 0.08


def test_nothing_comes_from_the_future(implementation):
    """Not a NaN either, and no gradient goes there."""
    inputs, upstream = drawn((1, 300, 2, 1, 16), torch.bfloat16)
    if implementation != "blocks":  # these take the mean key from all
        clean = output_and_gradients(cpu_causal_attention, inputs, upstream)[0]
        spoilt = [x.detach().clone() for x in inputs]
        for x in spoilt:
            x[:, 256:] = float("nan")
        output = cpu_causal_attention(*spoilt)
        assert torch.equal(output[:, :256], clean[:, :256])
        assert output[:, 256:].isnan().all()
    upstream[:, 200:] = 0
    for gradient in output_and_gradients(cpu_causal_attention, inputs, upstream)[1:]:
        assert gradient[:, 200:].count_nonzero() == 0
        assert gradient[:, :200].count_nonzero()


def test_scores_of_any_size(implementation):
    """So large that one probability is 1 and the others 0, and all the same."""
    (q, k, v), upstream = drawn((1, 150, 2, 2, 16), torch.bfloat16)
    with torch.no_grad():
        q *= 3000
    assert all(x.isfinite().all() for x in output_and_gradients(cpu_causal_attention, [q, k, v], upstream))
    with torch.no_grad():
        q *= 0
    assert max(errors([q, k, v], upstream)[i] for i in (0, 1, 3)) < 0.006


def test_the_number_of_threads_changes_no_digit(implementation):
    inputs, upstream = drawn((3, 140, 4, 2, 32), torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(output_and_gradients(cpu_causal_attention, inputs, upstream))
    finally:
        torch.set_num_threads(threads)
    if implementation != "blocks":  # torch's products promise no such thing
        for other in outputs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


def errors(inputs, upstream):
    """Of output and gradients: the norm of what float64 makes different, over the norm."""
    ours = output_and_gradients(cpu_causal_attention, inputs, upstream)
    assert {x.dtype for x in ours} == {torch.bfloat16}
    exact = output_and_gradients(torchs_attention, *in_dtype(torch.float64, inputs, upstream))
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


def test_the_keys_gradient_is_summed_over_blocks_in_float32(monkeypatch):
    """128 blocks of one query each: sums in bf16 would be off by percents."""
    monkeypatch.setattr(cpu_attention, "QUERIES", 1)
    monkeypatch.setattr(cpu_attention, "kernel", lambda: None)
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
def test_torch_accepts_it_as_an_operation(implementation, learnt):
    """Its shapes and strides without values, and its gradients, as torch.compile and gradient checkpointing ask for
    them; of inputs that are parts of one tensor, not all of them learnt."""
    joined = torch.randn(2, cpu_attention.QUERIES + 3, 8, 8, dtype=torch.bfloat16)
    inputs = [x.detach().requires_grad_(learns) for x, learns in zip(joined.split((4, 2, 2), 2), learnt, strict=True)]
    library.opcheck(attention_and_denominators, tuple(inputs))
    if all(learnt):
        gathered = [x.detach().contiguous().requires_grad_() for x in inputs]
        upstream = torch.randn(inputs[0].shape).bfloat16()
        for a, b in zip(
            *(output_and_gradients(cpu_causal_attention, x, upstream) for x in (inputs, gathered)), strict=True
        ):
            assert torch.equal(a, b)


def test_without_a_compiler_bf16_goes_through_blocks(monkeypatch, tmp_path, recwarn):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpp.load_cpp.cache_clear()
    assert cpp.load_cpp(Path(cpu_attention.__file__).with_suffix(".cpp")) is None
    assert not recwarn.list


@pytest.mark.skipif(cpp.cpp_compiler() is None, reason="no C++ compiler")
def test_what_does_not_compile_is_said_and_goes_unused(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    with pytest.warns(UserWarning, match=r"broken.cpp was not built and goes unused, which is slower: .*answered"):
        assert cpp.load_cpp(broken) is None
    assert not list((tmp_path / "cache" / "minnow").iterdir())


@pytest.mark.skipif(cpp.cpp_compiler() is None, reason="no C++ compiler")
def test_it_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return SEVEN; }')
    assert cpp.load_cpp(source, "SEVEN=7").seven() == 7
    cpp.load_cpp.cache_clear()
    monkeypatch.setattr(cpp, "_build", None)
    assert cpp.load_cpp(source, "SEVEN=7").seven() == 7
    assert len(list((tmp_path / "cache" / "minnow").iterdir())) == 1


@pytest.mark.parametrize(
    ("rows", "length", "heads", "key_heads", "size"),
    [(32, 200, 8, 2, 64), (1, 256, 4, 4, 32), (5, 100, 6, 3, 48), (3, 77, 20, 1, 16), (2, 65, 10, 2, 80)],
)
def test_a_new_token_sees_its_rows_places_up_to_its_own(implementation, rows, length, heads, key_heads, size):
    """Against float64; the rows end anywhere, and there are more of them than decode."""
    if implementation == "blocks":
        pytest.skip("torch's attention does it then")
    generator = torch.Generator().manual_seed(0)
    q_BHd = torch.randn(rows, heads, size, generator=generator).bfloat16()
    keys, values = (torch.randn(rows + 2, length, key_heads, size, generator=generator).bfloat16() for _ in range(2))
    places_B = torch.randint(length, (rows,), generator=generator)
    places_B[0] = length - 1
    places_B[-1] = 0 if rows > 1 else length - 1
    barred = torch.where(torch.arange(length) > places_B[:, None], -torch.inf, 0.0)[:, None, None].double()
    exact = torch.nn.functional.scaled_dot_product_attention(
        q_BHd[:, :, None].double(),
        keys[:rows].transpose(1, 2).double(),
        values[:rows].transpose(1, 2).double(),
        attn_mask=barred,
        enable_gqa=True,
    )[:, :, 0]
    output = cpu_attention.cpu_decode_attention(q_BHd, keys, values, places_B)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact, rtol=0.006, atol=0.002)
