"""Routing and dispatch against plain loops, and what a mixture's shape allows and costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import positions_like, randomized, row_logits, tiny_config, tiny_model

import minnow.model.moe as moe_module
from minnow.config import UserError
from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.moe import Experts, MoE, Plan, Router, Routing, grouped_product, looped_product, make_plan
from minnow.model.size import active_parameter_count, forward_flops_per_token, parameter_count
from minnow.model.transformer import CausalLM


def softmax_experts(**changes) -> ExpertsConfig:
    return ExpertsConfig(**({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} | changes))


def sigmoid_experts(**changes) -> ExpertsConfig:
    return softmax_experts(**({"scoring": "sigmoid", "n_shared_experts": 1} | changes))


def naive(experts: Experts, x_ND: torch.Tensor, chosen_Nk: torch.Tensor, weights_Nk: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token, chosen, weights in zip(x_ND, chosen_Nk.tolist(), weights_Nk, strict=True):
        out = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up = experts.gate_proj[expert] @ token, experts.up_proj[expert] @ token
            out = out + weight * (experts.down_proj[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("width", [16, 7])  # in one call; expert by expert
def test_without_a_token_every_expert_has_a_gradient_of_zeros(width: int) -> None:
    """A process whose micro-batch is filler must take part in the exchange of gradients like the others."""
    experts = Experts(width, softmax_experts())
    for parameter in experts.parameters():
        torch.nn.init.ones_(parameter)
    out_ND = experts(torch.zeros(0, width), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert out_ND.shape == (0, width)
    out_ND.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


@given(
    tokens=st.integers(1, 40), count=st.integers(1, 6), width=st.sampled_from([4, 7, 16]), seed=st.integers(0, 99),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_experts_are_a_loop_over_tokens(tokens, count, width, seed, data):
    """Value and every gradient, whichever product is taken (widths of 7 leave only the loop), with empty experts."""
    k = data.draw(st.integers(1, count))
    config = softmax_experts(num_experts=count, num_experts_per_tok=k, moe_intermediate_size=8)
    experts = randomized(Experts(width, config), seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, requires_grad=True)
    chosen = torch.rand(tokens, count, generator=generator).topk(k).indices
    weights = torch.rand(tokens, k, generator=generator, requires_grad=True)
    upstream = torch.randn(tokens, width, generator=generator)
    inputs = [x, weights, *experts.parameters()]
    expected = naive(experts, x, chosen, weights)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    got = experts(x, chosen, weights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for gradient, wanted in zip(torch.autograd.grad(got, inputs, upstream), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alignment", [1, 8])
def test_grouped_and_looped_products_agree(alignment, monkeypatch):
    """As on CUDA, where each expert's slots begin at a multiple of 8; one expert has none."""
    experts = randomized(Experts(16, softmax_experts(num_experts=5)))
    chosen = torch.tensor([[0, 1], [1, 4], [0, 4], [4, 1], [1, 0], [2, 1], [0, 2], [1, 2], [4, 0]])
    plan = make_plan(chosen, 5, alignment)
    assert plan.counts.tolist() == ([5, 6, 3, 0, 4] if alignment == 1 else [8, 8, 8, 0, 8])
    x = torch.randn(9, 16, requires_grad=True)
    weights = torch.rand(9, 2)
    used = int(plan.counts.sum())

    def looped(x_PI: torch.Tensor, weight_EOI: torch.Tensor, given: Plan) -> torch.Tensor:
        return looped_product(x_PI[:used], weight_EOI, given)  # the loop has no slots behind the last expert's

    results = []
    monkeypatch.setattr(moe_module, "_has_grouped_mm", lambda *_: True)
    monkeypatch.setattr(moe_module, "make_plan", lambda chosen, count, _: make_plan(chosen, count, alignment))
    for product in (looped, grouped_product):
        monkeypatch.setattr(moe_module, "grouped_product", product)
        out = experts(x, chosen, weights)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *experts.parameters()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_router_by_hand():
    """Logits 2, 1, 0: softmax 0.665, 0.245, 0.090; the two best weigh 0.731 and 0.269 when normalised."""
    x = torch.eye(3)[:1]
    logits = torch.tensor([[2.0], [1.0], [0.0]])
    weight = torch.cat([logits, torch.zeros(3, 2)], dim=1)
    plain, normed = (
        Router(3, softmax_experts(num_experts=3, norm_topk_prob=norm)).requires_grad_(False) for norm in (False, True)
    )
    for router, expected in ((plain, [0.6652, 0.2447]), (normed, [0.7311, 0.2689])):
        router.weight.copy_(weight)
        weights, decisions = router(x)
        torch.testing.assert_close(weights, torch.tensor([expected]), atol=1e-4, rtol=0)
        assert decisions.experts_Nk.tolist() == [[0, 1]]
        assert float(decisions.probabilities_NE.sum()) == pytest.approx(1.0)


def test_sigmoid_router_by_hand():
    """Logits ln 3, 0, -ln 3: scores 3/4, 1/2, 1/4, as shares 1/2, 1/3, 1/6; the two best weigh 3/5 and 2/5, doubled."""
    router = Router(1, sigmoid_experts(num_experts=3, routed_scaling_factor=2.0)).requires_grad_(False)
    router.weight.copy_(torch.tensor([[3.0], [1.0], [1 / 3]]).log())
    weights, decisions = router(torch.ones(1, 1))
    torch.testing.assert_close(weights, torch.tensor([[1.2, 0.8]]))
    torch.testing.assert_close(decisions.probabilities_NE, torch.tensor([[1 / 2, 1 / 3, 1 / 6]]))


@pytest.mark.parametrize("experts", [softmax_experts(), sigmoid_experts()])
def test_the_router_decides_in_fp32_whatever_it_is_given(experts):
    """In bf16 experts whose scores are close change places."""
    router = randomized(Router(64, experts))
    x = torch.randn(200, 64).bfloat16()
    for got, expected in zip(router(x), router(x.float()), strict=True):
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


def test_the_selection_bias_chooses_but_does_not_weigh():
    router = randomized(Router(8, sigmoid_experts(num_experts=4)))
    x = torch.randn(50, 8)
    before, decisions = router(x)
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    after, moved = router(x)
    assert (moved.experts_Nk == 3).any(1).all(), "a great bias brings every token to the expert"
    assert not (decisions.experts_Nk == 3).any(1).all()
    same = (decisions.experts_Nk.sort(1).values == moved.experts_Nk.sort(1).values).all(1)
    assert same.any()
    torch.testing.assert_close(before[same].sort(1).values, after[same].sort(1).values)


def test_groups_by_hand():
    """Scores 1/2 plus the bias: (0.2, -0.5) and (0.1, -0.3), so -0.3 and -0.2 for the two best of a group."""
    groups = {"n_group": 2, "topk_group": 1, "num_experts": 4}
    router = Router(1, sigmoid_experts(**groups)).requires_grad_(False)
    router.weight.zero_()
    router.e_score_correction_bias.copy_(torch.tensor([-0.3, -1.0, -0.4, -0.8]))
    _, decisions = router(torch.ones(1, 1))
    assert decisions.experts_Nk.tolist() == [[2, 3]], "both of the better group, of which one is below 0"


def test_noise_is_shazeers_and_only_in_training():
    """Equation 4 of 1701.06538: W_g x + noise * softplus(W_noise x). Without noise given, none is taken."""
    router = randomized(Router(8, softmax_experts(noisy=True)))
    x, noise = torch.randn(20, 8), torch.randn(20, 4)
    _, decisions = router(x, noise)
    scale = torch.log1p((x @ router.noise_weight.T).exp())
    expected = (x @ router.weight.T + noise * scale).softmax(-1)
    torch.testing.assert_close(decisions.probabilities_NE, expected)
    torch.testing.assert_close(router(x)[1].probabilities_NE, (x @ router.weight.T).softmax(-1))
    model = tiny_model(experts=softmax_experts(noisy=True)).train()
    tokens = torch.randint(0, 97, (2, 9))
    assert torch.equal(row_logits(model, tokens), row_logits(model.eval(), tokens))


def test_filler_goes_to_no_expert():
    layer = randomized(MoE(8, softmax_experts(noisy=True), None))
    x, noise = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 4)
    filler = torch.tensor([[False, False, False, True, True], [False] * 5])
    out, decisions = layer(x, 0, Routing(filler, lambda _: noise))
    whole, _ = layer(x, 0, Routing(torch.zeros_like(filler), lambda _: noise))  # each place has noise of its own
    assert decisions.experts_Nk.shape == (8, 2)
    assert not out[filler].any()
    torch.testing.assert_close(out[~filler], whole[~filler])
    out.sum().backward()
    assert not x.grad[filler].any()
    assert x.grad[~filler].any()


@pytest.mark.parametrize("experts", [softmax_experts(), sigmoid_experts(first_k_dense_replace=1)])
def test_gradient_checkpointing_changes_nothing(experts):
    tokens = torch.randint(0, 97, (2, 12))
    gradients, reports = [], []
    for mode in ("off", "full"):
        model = tiny_model(experts=experts)
        model.gradient_checkpointing = mode
        model.routing = Routing(torch.zeros(2, 12, dtype=torch.bool))
        model(tokens, positions_like(tokens), CausalAttention()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        reports.append([layer for layer, _ in model.routing.decisions])
    assert reports[0] == reports[1] == [index for index in range(3) if model.config.is_sparse(index)]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_every_expert_starts_differently_and_adds_nothing():
    model = CausalLM(tiny_config(experts=sigmoid_experts()))
    gate = model.model.layers[0].mlp.experts.gate_proj
    assert not torch.equal(gate[0], gate[1])
    assert float(gate.detach().std()) == pytest.approx(0.5 / 48**0.5, rel=0.1)
    assert not model.model.layers[0].mlp.experts.down_proj.any()
    noisy = CausalLM(tiny_config(experts=softmax_experts(noisy=True))).model.layers[0].mlp.gate
    assert not noisy.noise_weight.any()  # one deviation for all, softplus(0) = log 2 (1701.06538, appendix A)
    assert noisy.weight.any()


@pytest.mark.parametrize(
    "experts", [softmax_experts(noisy=True), softmax_experts(first_k_dense_replace=2), sigmoid_experts()]
)
def test_parameter_count_is_exact(experts):
    for tied in (True, False):
        config = tiny_config(experts=experts, tie_word_embeddings=tied)
        assert parameter_count(config) == sum(p.numel() for p in CausalLM(config).parameters())


def test_active_parameters_by_hand():
    # A layer of width 48 has experts of 3 * 48 * 16 = 2304; of 4, 2 are idle; 3 layers.
    config = tiny_config(experts=softmax_experts())
    assert parameter_count(config) - active_parameter_count(config) == 3 * 2 * 2304
    dense = tiny_config(intermediate_size=32)  # as wide as two experts
    router = 3 * 4 * 48
    assert active_parameter_count(config) == parameter_count(dense) + router
    assert forward_flops_per_token(config, 8) == forward_flops_per_token(dense, 8) + 2 * router
    assert active_parameter_count(dense) == parameter_count(dense)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_shared_experts": 1}, r"n_shared_experts with scoring softmax .* no Hugging Face class"),
        ({"routed_scaling_factor": 2.0}, "go with scoring sigmoid only"),
        ({"num_experts_per_tok": 5}, "more than num_experts"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"noisy": True, "norm_topk_prob": False}, "leave norm_topk_prob on"),
        ({"scoring": "sigmoid"}, "n_shared_experts of at least 1"),
        ({"scoring": "sigmoid", "n_shared_experts": 1, "noisy": True}, "noisy goes with scoring softmax"),
        ({"scoring": "sigmoid", "n_shared_experts": 1, "n_group": 4}, "groups of at least 2"),
        ({"scoring": "sigmoid", "n_shared_experts": 1, "n_group": 2, "topk_group": 3}, "more than n_group"),
        (
            {"scoring": "sigmoid", "n_shared_experts": 1, "n_group": 2, "num_experts_per_tok": 3},
            "1 groups of 2 experts hold",
        ),
    ],
)
def test_what_no_class_has_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        softmax_experts(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": False, "experts": softmax_experts()}, "needs model.qk_norm"),
        ({"attention_bias": True, "experts": softmax_experts()}, "all four or none"),
        ({"mlp_bias": True, "experts": softmax_experts()}, "LlamaForCausalLM only"),
        ({"experts": softmax_experts(first_k_dense_replace=8)}, "leaves none of the 8 layers"),
        (
            {"attention_bias": True, "attention_output_bias": True, "experts": sigmoid_experts()},
            "not in Glm4MoeForCausalLM",
        ),
    ],
)
def test_shapes_around_experts_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**changes)


def test_one_expert_a_token_is_not_normalised_by_default():
    assert softmax_experts(num_experts_per_tok=1).norm_topk_prob is False
    assert softmax_experts().norm_topk_prob is True
    assert not softmax_experts(num_experts_per_tok=1, norm_topk_prob=True).router_learns
