"""The packed copy computes the same function; the compiled step too; new weights drop both, or renew them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from engine_helpers import random_prompts, tiny_model, tiny_tokenizer

from minnow.engine import Engine, SamplingParams
from minnow.engine.compiled import linear_by_columns
from minnow.engine.packed import PackedModel, can_pack, packed_bytes
from minnow.model.attention import CausalAttention
from minnow.model.experts_config import ExpertsConfig
from minnow.model.lora import LoraConfig, add_lora
from minnow.model.transformer import CausalLM

SHAPES = [{}, {"tie_word_embeddings": False}, {"qk_norm": False, "attention_bias": True}]


@pytest.mark.parametrize("changes", SHAPES)
def test_hidden_states_and_logits_are_the_models(changes: dict[str, Any]) -> None:
    model = tiny_model(1, **changes)
    packed = PackedModel(model)
    tokens = torch.tensor(random_prompts(1, 2)).repeat(2, 1)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        ours, theirs = (m(tokens, positions, CausalAttention()) for m in (packed, model))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed.logits(ours), model.logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", SHAPES)
def test_a_frozen_engine_gives_the_same_tokens(changes: dict[str, Any]) -> None:
    prompts, params = random_prompts(10, 3), SamplingParams(seed=1, n=2, max_tokens=20)
    outputs = [
        Engine(tiny_model(3, **changes), tiny_tokenizer(), frozen=frozen).generate(prompts, params)
        for frozen in (False, True)
    ]
    assert [[c.ids for c in o.completions] for o in outputs[0]] == [[c.ids for c in o.completions] for o in outputs[1]]


def test_new_weights_are_frozen_anew() -> None:
    model, other = tiny_model(4), tiny_model(5)
    engine = Engine(model, tiny_tokenizer(), frozen=True)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    before = engine.generate([[5, 6]], params)[0].completions[0].ids
    model.load_state_dict(other.state_dict())
    engine.weights_updated()
    after = engine.generate([[5, 6]], params)[0].completions[0].ids
    assert after != before
    assert after == Engine(other, tiny_tokenizer()).generate([[5, 6]], params)[0].completions[0].ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", SHAPES)
def test_a_copy_is_renewed_in_place(changes: dict[str, Any], dtype: torch.dtype) -> None:
    model, other = tiny_model(1, **changes), tiny_model(2, **changes)
    model.compute_dtype = other.compute_dtype = dtype
    packed = PackedModel(model)
    places = [parameter.data_ptr() for parameter in packed.parameters()]
    model.load_state_dict(other.state_dict())
    packed.renew(model)
    assert [parameter.data_ptr() for parameter in packed.parameters()] == places
    for mine, expected in zip(packed.parameters(), PackedModel(other).parameters(), strict=True):
        assert torch.equal(mine, expected)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    own = {parameter.data_ptr(): parameter.nbytes for parameter in packed.parameters()}
    assert packed_bytes(model.config, dtype) == sum(size for place, size in own.items() if place not in shared)


def test_a_model_with_other_parts_is_not_packed() -> None:
    class Adapted(torch.nn.Linear):
        pass

    model = tiny_model(6)
    assert can_pack(model)
    model.model.layers[1].mlp.up_proj = Adapted(32, 64, bias=False)
    assert not can_pack(model)
    engine = Engine(model, tiny_tokenizer(), frozen=True)
    assert engine.generate([[5]], SamplingParams(max_tokens=2))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_compiled_step_gives_the_same_tokens(capfd: pytest.CaptureFixture[str]) -> None:
    prompts, params = random_prompts(6, 7), SamplingParams(seed=2, n=2, max_tokens=40, ignore_eos=True)
    plain = Engine(tiny_model(7), tiny_tokenizer()).generate(prompts, params)
    engine = Engine(tiny_model(7), tiny_tokenizer(), frozen=True, compile=True)
    with inductor.patch(force_disable_caches=True):  # what is found in a cache is not tried
        compiled = engine.generate(prompts, params)
    assert "autotune" not in capfd.readouterr().err.lower(), "pages of it for each product"
    assert [[c.ids for c in o.completions] for o in compiled] == [[c.ids for c in o.completions] for o in plain]
    single = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    expected = Engine(tiny_model(7), tiny_tokenizer()).generate(prompts[:1], single)[0].completions[0].ids
    assert engine.generate(prompts[:1], single)[0].completions[0].ids == expected
    other = tiny_model(8)  # constants of the old weights must not live on
    engine.model.load_state_dict(other.state_dict())
    engine.weights_updated()
    expected = Engine(other, tiny_tokenizer()).generate(prompts[:1], single)[0].completions[0].ids
    assert engine.generate(prompts[:1], single)[0].completions[0].ids == expected


@pytest.mark.parametrize("lora", [False, True])
def test_a_live_model_may_be_compiled_and_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    """Traced as for inductor, run as it is: one graph must serve all weights, numbers of rows and lengths."""
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        linear_by_columns(graph)
        graphs.append(graph)
        return graph

    monkeypatch.setattr("minnow.engine.compiled.few_columns", counting)
    torch._dynamo.reset()
    check_live_compiled(lora)
    assert len(graphs) == 1
    assert not graphs[0].graph.find_nodes(op="call_function", target=F.linear)


@pytest.mark.parametrize("bias", [None, torch.randn(7, dtype=torch.float64)])
def test_linear_layers_by_columns_are_the_same_sums(bias: torch.Tensor | None) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(F.linear(x, weight, bias).relu(), weight.T)

    x, weight = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    graph = torch.fx.symbolic_trace(function, concrete_args={"bias": bias})
    linear_by_columns(graph)
    assert not graph.graph.find_nodes(op="call_function", target=F.linear)
    torch.testing.assert_close(graph(x, weight, bias), function(x, weight, bias), rtol=1e-13, atol=1e-13)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_live_model_compiled_by_inductor_gives_the_same_tokens() -> None:
    check_live_compiled(lora=False)


def check_live_compiled(lora: bool) -> None:
    """Equal tokens, from one row to several, before and after an update of the weights."""
    prompts = random_prompts(6, 7)
    params = SamplingParams(seed=2, n=2, max_tokens=40, ignore_eos=True, logprobs=True)
    models = [tiny_model(seed) for seed in (7, 7, 8)]
    if lora:
        for seed, model in enumerate(models):
            add_lora(model, LoraConfig(rank=4), base="base", seed=seed)
            randomize_adapters(model, seed)
    live, *others = models
    engine = Engine(live.eval(), tiny_tokenizer(), compile=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the decode step could not be compiled")  # torch has warnings of its own
        for weights in others:
            live.train()  # as between the phases of reinforcement
            live.load_state_dict(weights.eval().state_dict())
            live.eval()
            engine.weights_updated()
            for asked in (prompts, prompts[:3]):
                plain, found = (each.generate(asked, params) for each in (Engine(weights, tiny_tokenizer()), engine))
                for expected, output in zip(plain, found, strict=True):
                    for theirs, mine in zip(expected.completions, output.completions, strict=True):
                        assert mine.ids == theirs.ids
                        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def randomize_adapters(model: CausalLM, seed: int) -> None:
    """Untrained adapters add nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def test_a_model_with_routers_is_not_compiled() -> None:
    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    engine = Engine(tiny_model(9, experts=experts), tiny_tokenizer(), compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.generate([[5, 6], [7]], SamplingParams(max_tokens=3))
