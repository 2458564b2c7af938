"""LoRA computes what the papers write, merges without a trace, and PEFT agrees in both directions."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from model_helpers import positions_like, row_logits, tiny_model
from transformers import AutoModelForCausalLM

from minnow.config import UserError
from minnow.model.adapter import _by_pattern, attach_adapter
from minnow.model.attention import CausalAttention
from minnow.model.experts_config import ExpertsConfig
from minnow.model.lora import LoraConfig, adapters_off, add_lora, lora_layers, merge_lora
from minnow.model.pretrained import load_pretrained, load_with_adapter, save_pretrained

TOKENS_BT = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(3))
SHAPES = {"qwen3": {}, "qwen2": {"attention_bias": True, "qk_norm": False, "head_dim": 12}}
KINDS = {
    "plain": {},
    "alpha": {"alpha": 5.0},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "some": {"targets": ("q_proj", "layers.1.mlp.*"), "rslora": True, "dora": True},
}


def adapted(base="base", seed=0, shape=None, **settings):
    """A random model with random adapters: nothing hides behind a B of zero."""
    model = tiny_model(seed, **(shape or {}))
    add_lora(model, LoraConfig(**({"rank": 4} | settings)), base=str(base))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty(parameter.shape).uniform_(-0.1, 0.1, generator=generator))
    return model


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_formula(settings, shape):
    """Against float64, written out for each layer."""
    for layer in lora_layers(adapted(shape=shape, **settings)).values():
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        rank = layer.lora_A.weight.shape[0]
        s = settings.get("alpha", 8.0) / (math.sqrt(rank) if settings.get("rslora") else rank)
        w = layer.weight.double() + s * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        if settings.get("dora"):
            w = layer.lora_magnitude_vector.double()[:, None] * w / w.pow(2).sum(1, keepdim=True).sqrt()
        expected = x.double() @ w.T + (0 if layer.bias is None else layer.bias.double())
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.merged()(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_with_rslora_a_large_rank_learns_as_fast_as_a_small_one():
    """What a first step takes off the loss: |dL/dB|^2 = s^2 |g|^2 |A x|^2, of which |A x|^2 grows with the rank r. So
    it is the same for all ranks where s is some number over sqrt(r)."""

    def gain(rank: int) -> float:
        model = tiny_model(1)
        add_lora(model, LoraConfig(rank=rank, rslora=True), base="base")
        row_logits(model, TOKENS_BT).log_softmax(-1)[..., 0].sum().backward()
        return sum(float(layer.lora_B.weight.grad.square().sum()) for layer in lora_layers(model).values())

    assert gain(256) / gain(16) == pytest.approx(1.0, abs=0.3)
    both = [LoraConfig(rank=16, rslora=rslora) for rslora in (False, True)]
    assert [config.scaling for config in both] == [2.0, 2.0]  # at the usual rank nothing changes


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_starts_as_the_base_and_merges_to_the_same(settings):
    base = tiny_model()
    model = tiny_model()
    add_lora(model, LoraConfig(rank=4, **settings), base="base")
    torch.testing.assert_close(row_logits(model, TOKENS_BT), row_logits(base, TOKENS_BT), rtol=1e-5, atol=1e-5)
    model = adapted(**settings)
    before = row_logits(model, TOKENS_BT)
    assert not torch.allclose(before, row_logits(base, TOKENS_BT), atol=1e-2)
    with adapters_off(model):
        torch.testing.assert_close(row_logits(model, TOKENS_BT), row_logits(base, TOKENS_BT), rtol=0, atol=0)
    torch.testing.assert_close(row_logits(model, TOKENS_BT), before, rtol=0, atol=0)
    merge_lora(model)
    assert not lora_layers(model)
    assert set(model.state_dict()) == set(base.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(row_logits(model, TOKENS_BT), before, rtol=1e-5, atol=1e-5)


def test_only_adapters_are_trained():
    model = adapted(dora=True)
    row_logits(model, TOKENS_BT).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert (parameter.grad is not None) == ("lora_" in name), name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("settings", [KINDS["plain"], KINDS["dora"]], ids=["plain", "dora"])
def test_gradients_are_pefts(settings, tmp_path):
    """The loss of PEFT's model and of ours have the same gradient in every adapter weight."""
    save_pretrained(tiny_model(), tmp_path / "base")
    model = adapted(tmp_path / "base", **settings)
    save_pretrained(model, tmp_path / "adapter")
    modes = {
        (tmp_path / "adapter" / name).stat().st_mode for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert len(modes) == 1  # whoever may read the one may read the other
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", is_trainable=True
    ).eval()
    row_logits(model, TOKENS_BT).tanh().sum().backward()
    theirs(TOKENS_BT).logits.tanh().sum().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    ours = {f"base_model.model.{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    ours = {n + ".weight" if n.endswith("magnitude_vector") else n: gradient for n, gradient in ours.items()}
    assert set(ours) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_peft_loads_ours(settings, shape, tmp_path):
    save_pretrained(tiny_model(**shape), tmp_path / "base")
    model = adapted(tmp_path / "base", shape=shape, **settings)
    save_pretrained(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    ours = row_logits(model, TOKENS_BT)
    torch.testing.assert_close(ours, theirs(TOKENS_BT).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs.merge_and_unload()(TOKENS_BT).logits, rtol=1e-5, atol=1e-5)
    again = load_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(row_logits(again, TOKENS_BT), ours, rtol=1e-5, atol=1e-5)


PEFTS = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "expression": {"target_modules": r".*layers\.[02]\..*(k_proj|up_proj)", "use_rslora": True},
    "all": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"k_proj": 40, r"layers\.[01]\.mlp\.down_proj": 3},
    },
    "layers": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
}


def save_pefts(folder, **settings):
    """PEFT's own random adapter, saved in folder/adapter on the model in folder/base, and its logits."""
    save_pretrained(tiny_model(), folder / "base")
    config = peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.empty(parameter.shape).uniform_(-0.1, 0.1, generator=generator))
    theirs.save_pretrained(folder / "adapter")
    return theirs(TOKENS_BT).logits


@pytest.mark.parametrize("settings", PEFTS.values(), ids=PEFTS)
def test_ours_loads_pefts(settings, tmp_path):
    expected = save_pefts(tmp_path, **settings)
    loaded = load_with_adapter(tmp_path / "adapter")
    torch.testing.assert_close(row_logits(loaded, TOKENS_BT), expected, rtol=1e-5, atol=1e-5)
    merged = load_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(row_logits(merged, TOKENS_BT), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", PEFTS.values(), ids=PEFTS)
def test_pefts_adapter_keeps_its_settings_when_we_save_it_again(settings, tmp_path):
    expected = save_pefts(tmp_path, lora_dropout=0.25, **settings)
    loaded = load_with_adapter(tmp_path / "adapter")
    assert all(layer.dropout == 0.25 for layer in lora_layers(loaded).values())
    save_pretrained(loaded, tmp_path / "again")
    kept = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    before, after = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "again"))
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "again"
    ).eval()
    torch.testing.assert_close(theirs(TOKENS_BT).logits, expected, rtol=1e-5, atol=1e-5)
    merged = load_pretrained(tmp_path / "again")
    torch.testing.assert_close(row_logits(merged, TOKENS_BT), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_with_experts_attention_is_adapted_and_peft_agrees(scoring, tmp_path):
    """PEFT takes any gate_proj of such a model for the experts', those of dense layers and shared experts too."""
    shared = {"n_shared_experts": 1, "first_k_dense_replace": 1} if scoring == "sigmoid" else {}
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    shape = {"experts": ExpertsConfig(**sizes, **shared, scoring=scoring), "tie_word_embeddings": scoring != "sigmoid"}
    save_pretrained(tiny_model(**shape), tmp_path / "base")
    model = adapted(tmp_path / "base", shape=shape)
    assert {name.split(".")[3] for name in lora_layers(model)} == {"self_attn"}
    assert len(lora_layers(model)) == 4 * 3
    save_pretrained(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", experts_implementation="eager"), tmp_path / "adapter"
    ).eval()
    ours = row_logits(model, TOKENS_BT)
    torch.testing.assert_close(theirs(TOKENS_BT).logits, ours, rtol=1e-5, atol=1e-5)
    merged = load_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(row_logits(merged, TOKENS_BT), ours, rtol=1e-5, atol=1e-5)
    for pattern in ("gate_proj", "layers.0.mlp.*", "experts"):
        with pytest.raises(UserError, match="called k_proj, o_proj, q_proj, v_proj .it has routed experts"):
            add_lora(tiny_model(**shape), LoraConfig(rank=2, targets=("q_proj", pattern)), base="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"target_parameters": ["gate_up_proj"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora = True is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "stands for a base with other weights"),
        ({"base_model_name_or_path": None}, "does not name its model"),
        ({"base_model_name_or_path": "gone"}, "its base cannot be had: gone: no such folder"),
    ],
)
def test_what_cannot_be_honoured_is_refused(change, message, tmp_path):
    save_pretrained(tiny_model(), tmp_path / "base")
    save_pretrained(adapted(tmp_path / "base"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "adapter")


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    save_pretrained(adapted(), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapts model\.layers\.2\..*, which is no linear layer"):
        attach_adapter(tiny_model(num_hidden_layers=2), tmp_path / "adapter")
    with pytest.raises(UserError, match="other layers or another rank"):
        attach_adapter(tiny_model(hidden_size=32), tmp_path / "adapter")


def test_settings_are_checked():
    with pytest.raises(UserError, match="'qproj' fits no linear layer of this model; they are called down_proj, gate"):
        add_lora(tiny_model(), LoraConfig(rank=2, targets=("*_proj", "qproj")), base="")
    for wrong in ({"rank": -1}, {"dropout": 1.0}, {"rank": 1, "targets": ()}, {"rank": 1, "alpha": 0.0}):
        with pytest.raises(UserError, match=r"lora\."):
            LoraConfig(**wrong)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(adapted(), LoraConfig(rank=2), base="")


def test_a_starts_uniform_by_the_width_of_what_it_reads():
    model = tiny_model()
    add_lora(model, LoraConfig(rank=16), base="")
    layers = lora_layers(model)
    assert all(layer.in_features != layer.out_features for layer in layers.values())
    for layer in layers.values():
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.98 * bound < layer.lora_A.weight.abs().max() <= bound
        assert not layer.lora_B.weight.any()


def test_a_starts_as_the_seed_draws_it():
    drawn = []
    for seed in (1, 1, 2):
        model = tiny_model()
        add_lora(model, LoraConfig(rank=4), base="", seed=seed)
        drawn.append([layer.lora_A.weight for layer in lora_layers(model).values()])
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not any(map(torch.equal, drawn[0], drawn[2]))


def test_a_pattern_names_whole_parts_of_a_name():
    """`proj` is the end of every name, and no name."""
    for pattern in ("proj", "_proj", "mlp"):
        with pytest.raises(UserError, match="fits no linear layer"):
            add_lora(tiny_model(), LoraConfig(rank=4, targets=(pattern,)), base="")
    patterns = {"proj": 3, "k_proj": 5, r"layers\.1\..*": 7}
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj")
    assert [_by_pattern(patterns, name, 8) for name in names] == [8, 5, 7]


def test_adapters_are_on_again_after_an_error():
    model = adapted()
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        _ = 1 / any(layer.enabled for layer in lora_layers(model).values())  # none is: an error
    assert all(layer.enabled for layer in lora_layers(model).values())


def test_dropout_is_of_training_only():
    model = adapted(dropout=0.5)
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(row_logits(model, TOKENS_BT), row_logits(model, TOKENS_BT))
    model.eval()
    assert torch.equal(row_logits(model, TOKENS_BT), row_logits(model, TOKENS_BT))


def test_gradient_checkpointing_draws_the_same_dropout_again():
    gradients = []
    for checkpointing in ("off", "selective", "full"):
        model = adapted(dropout=0.5)
        model.gradient_checkpointing = checkpointing
        model.train()
        torch.manual_seed(0)
        row_logits(model, TOKENS_BT).pow(2).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, *recomputed in zip(*gradients, strict=True):
        for again in recomputed:
            torch.testing.assert_close(plain, again, rtol=0, atol=0)


@pytest.mark.slow
def test_compiled():
    model, plain = adapted(dora=True), adapted(dora=True)
    model.compile_backbone()
    for one in (model, plain):
        one(TOKENS_BT, positions_like(TOKENS_BT), CausalAttention()).pow(2).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    with adapters_off(model):
        off = model(TOKENS_BT, positions_like(TOKENS_BT), CausalAttention())
    torch.testing.assert_close(model.logits(off), row_logits(tiny_model(), TOKENS_BT), rtol=1e-4, atol=1e-4)


def test_bf16_base_keeps_fp32_adapters():
    model = adapted()
    expected = row_logits(model, TOKENS_BT)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    assert (row_logits(model, TOKENS_BT) - expected).abs().max() < 0.1 * expected.abs().max()


def test_dora_on_rows_of_zeros_stays_finite():
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.o_proj").weight.zero_()
    expected = row_logits(model, TOKENS_BT)
    add_lora(model, LoraConfig(rank=2, dora=True), base="")
    logits = row_logits(model, TOKENS_BT)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    merge_lora(model)
    assert row_logits(model, TOKENS_BT).isfinite().all()
