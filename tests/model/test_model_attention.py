"""Packed documents give what each document gives alone: hidden states, logits, gradients."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import row_logits, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from minnow.config import UserError
from minnow.model import attention, transformer
from minnow.model.attention import (
    CausalAttention,
    PackedAttention,
    causal_attention,
    has_flash_attention,
    with_a_key_head_each,
)
from minnow.model.experts_config import ExpertsConfig
from minnow.model.transformer import CausalLM

LENGTHS = {
    "mixed": [[5, 17, 1, 40], [63], [33, 30]],
    "full rows": [[63], [63]],
    "equal pieces": [[21, 21, 21], [21, 21, 21]],
    "all ones": [[1] * 8],
}


def packed(lengths: list[list[int]], seed: int = 0):
    """Rows of random documents: (tokens, positions, cu_seqlens, the documents one by one)."""
    generator = torch.Generator().manual_seed(seed)
    flat = [length for row in lengths for length in row]
    documents = [torch.randint(0, 97, (1, length), generator=generator) for length in flat]
    shape = (len(lengths), sum(lengths[0]))
    tokens = torch.cat(documents, dim=1).view(shape)
    positions = torch.cat([torch.arange(length) for length in flat]).view(shape)
    cu_seqlens = torch.tensor([0, *flat]).cumsum(0).to(torch.int32)
    return tokens, positions, cu_seqlens, documents


@pytest.mark.parametrize("name", sorted(LENGTHS))
def test_packed_equals_unpacked(name):
    model = tiny_model()
    tokens, positions, cu_seqlens, documents = packed(LENGTHS[name])
    together = model.logits(model(tokens, positions, PackedAttention(cu_seqlens))).flatten(0, 1)
    alone = torch.cat([row_logits(model, document)[0] for document in documents])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)

    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    from_together = torch.autograd.grad((together.log_softmax(-1) * weights).mean(), parameters)
    from_alone = torch.autograd.grad((alone.log_softmax(-1) * weights).mean(), parameters)
    for ours, reference in zip(from_together, from_alone, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)


@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_packed_attention_is_attention_of_each_piece(lengths, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        shape = (1, sum(lengths), heads, 8)
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(4), draw(2), draw(2)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    ours = PackedAttention(cu_seqlens)(0, q, k, v)
    split = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    reference = torch.cat([causal_attention(*piece) for piece in split], dim=1)
    torch.testing.assert_close(ours, reference)
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((reference * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_causal_attention_is_the_formula():
    """softmax over the keys up to the query's own place, by loops in float64."""
    q, k, v = (torch.randn(1, 5, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    expected = torch.empty_like(q)
    for head in range(4):
        for place in range(5):
            keys = k[0, : place + 1, head // 2]
            scores = torch.softmax(keys @ q[0, place, head] / 2.0, dim=0)  # 2 = sqrt(4)
            expected[0, place, head] = scores @ v[0, : place + 1, head // 2]
    torch.testing.assert_close(causal_attention(q, k, v), expected)


def test_a_key_head_for_each_query_head_gives_what_grouped_heads_give():
    q, k, v = (torch.randn(2, 9, heads, 8) for heads in (6, 2, 2))
    torch.testing.assert_close(causal_attention(q, *with_a_key_head_each(q, k, v)), causal_attention(q, k, v))


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_flash_attention_is_for_half_precision_on_cuda(device, dtype):
    assert not has_flash_attention(torch.device(device), dtype)


def test_a_token_sees_only_its_own_past():
    model = tiny_model()
    tokens = torch.randint(0, 97, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 97
    before, after = row_logits(model, tokens), row_logits(model, changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_on_a_cpu_that_is_fast_in_it_goes_through_plain_products(monkeypatch, fast):
    monkeypatch.setattr(attention, "cpu_multiplies_bf16_faster", lambda: fast)
    monkeypatch.setattr(attention, "_multiplies_bf16_fast", cache(attention._multiplies_bf16_fast.__wrapped__))
    q, k, v = (torch.randn(2, 9, heads, 8) for heads in (6, 2, 2))
    by_torch = []
    for dtype in (torch.float32, torch.bfloat16):
        with CountedProducts() as count:
            causal_attention(q.to(dtype), k.to(dtype), v.to(dtype))
        assert count.attentions == 1
        by_torch.append(count.by_torch)
    assert by_torch == [1, 0 if fast else 1]


def gradients(model: CausalLM, tokens: torch.Tensor) -> list[torch.Tensor]:
    loss = row_logits(model, tokens).log_softmax(-1)[..., 0].mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


class CountedProducts(TorchDispatchMode):
    """Counts matrix products and attention calls."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attentions = self.by_torch = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.products += name == "aten::mm"
        attention = name.startswith(("aten::_scaled_dot_product", "minnow::cpu_causal_attention"))
        self.attentions += attention and "backward" not in name
        self.by_torch += name.startswith("aten::_scaled_dot_product")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[[24], [24]], [[5, 19], [24]]])
def test_gradient_checkpointing_changes_nothing_but_what_is_computed_again(monkeypatch, lengths, dtype):
    monkeypatch.setattr(attention, "_multiplies_bf16_fast", lambda: True)
    model = tiny_model()
    model.compute_dtype = dtype
    tokens, positions, cu_seqlens, _ = packed(lengths)
    gradients, products, attentions = {}, {}, {}
    for mode in ("off", "selective", "full"):
        model.gradient_checkpointing = mode
        hidden = model(tokens, positions, PackedAttention(cu_seqlens))
        loss = model.logits(hidden).log_softmax(-1)[..., 0].mean()
        with CountedProducts() as count:
            gradients[mode] = torch.autograd.grad(loss, list(model.parameters()))
        products[mode], attentions[mode] = count.products, count.attentions
    for mode in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(gradients[mode], gradients["off"], strict=True))
    # 3 layers of 7 matrices; the last one's results (down_proj) are needed by nothing and left out by early stop.
    assert products["selective"] == products["off"]
    assert products["off"] + 3 * 6 <= products["full"] <= products["off"] + 3 * 7
    assert attentions["off"] == attentions["selective"] == 0
    assert attentions["full"] >= 3


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradient_checkpointing_of_experts_changes_nothing(mode):
    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    model = tiny_model(experts=experts)
    tokens = torch.randint(0, 97, (2, 24))
    plain = gradients(model, tokens)
    model.gradient_checkpointing = mode
    for ours, reference in zip(gradients(model, tokens), plain, strict=True):
        assert torch.equal(ours, reference)


def test_selective_checkpointing_reaches_the_experts_of_a_compiled_model():
    """They are not compiled, so the compiler does not choose for them: the setting did nothing for them."""

    class Recomputed(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.activations = self.products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.activations += func._schema.name == "aten::silu"
            self.products += func._schema.name in ("aten::mm", "aten::_grouped_mm")
            return func(*args, **(kwargs or {}))

    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    model = tiny_model(experts=experts)
    model._compiled = transformer._PLAIN_PARTS
    tokens = torch.randint(0, 97, (2, 24))
    found = {}
    for mode in ("off", "selective"):
        model.gradient_checkpointing = mode
        loss = row_logits(model, tokens).log_softmax(-1)[..., 0].mean()
        with Recomputed() as count:
            found[mode] = torch.autograd.grad(loss, list(model.parameters())), count
    (off, plain), (selective, again) = found["off"], found["selective"]
    assert all(torch.equal(ours, reference) for ours, reference in zip(selective, off, strict=True))
    assert (plain.activations, again.activations) == (0, model.config.num_hidden_layers)
    assert again.products == plain.products, "the products are kept"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_compiling_changes_nothing_and_serves_all_layers(checkpointing):
    import torch._dynamo.utils

    model = tiny_model(num_hidden_layers=4)
    tokens = torch.randint(0, 97, (2, 24))
    plain = gradients(model, tokens)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_backbone()
    model.gradient_checkpointing = checkpointing
    for ours, reference in zip(gradients(model, tokens), plain, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)
    # Two graphs whatever the number of layers: before and after attention.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_sequences_longer_than_trained_are_refused():
    model = CausalLM(tiny_config(max_position_embeddings=16))
    row_logits(model, torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(UserError, match=r"17 tokens .* max_position_embeddings \(16\)"):
        row_logits(model, torch.zeros(1, 17, dtype=torch.int64))
    # One new token of a cached sequence counts by its place.
    with pytest.raises(UserError, match="17 tokens"):
        model(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[16]]), CausalAttention())
