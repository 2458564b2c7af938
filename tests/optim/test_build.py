"""Which parameter gets which optimizer, at which rate; state by name and its round trip."""

import pytest
import torch
from torch import nn

from minnow.config import UserError
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.transformer import CausalLM
from minnow.optim import (
    Muon,
    OptimConfig,
    build_optimizers,
    kind_of,
    load_named_state,
    named_state,
    parameter_groups,
    set_learning_rates,
)
from minnow.optim.config import OF_MUON


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(8)
        self.q_proj = nn.Linear(8, 8, bias=True)
        self.k_proj = nn.Linear(8, 4, bias=False)
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.randn(3, 12, 8))
        self.gate = nn.Linear(8, 3, bias=False)


class Toy(nn.Module):
    def __init__(self, tied=True, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(10, 8)
        self.model.layers = nn.ModuleList([Block(), Block()])
        self.model.norm = nn.RMSNorm(8)
        self.lm_head = nn.Linear(8, 10, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def train(model, optimizers, steps):
    for step in steps:
        give_gradients(model, step)
        set_learning_rates(optimizers, 1.0 / (step + 1))
        for optimizer in optimizers:
            optimizer.step()


def names(optimizers):
    return {group["kind"]: group["param_names"] for optimizer in optimizers for group in optimizer.param_groups}


def test_groups_by_name_and_dimensions():
    groups = {kind: [name for name, _ in members] for kind, members in parameter_groups(Toy(tied=False)).items()}
    block = ["q_proj.weight", "k_proj.weight", "down_proj.weight", "experts.up_proj"]
    assert sorted(groups["matrix"]) == sorted(f"model.layers.{i}.{name}" for i in (0, 1) for name in block)
    assert groups["embedding"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert groups["other"] == ["model.layers.0.gate.weight", "model.layers.1.gate.weight"]
    norms = ["input_layernorm.weight", "q_proj.bias"]
    assert sorted(groups["norm"]) == sorted(
        [*(f"model.layers.{i}.{name}" for i in (0, 1) for name in norms), "model.norm.weight"]
    )


def test_tied_embedding_comes_once_and_frozen_parameters_never():
    model = Toy(tied=True)
    model.model.layers[0].requires_grad_(False)
    members = [name for group in parameter_groups(model).values() for name, _ in group]
    assert members.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in members
    assert not any(name.startswith("model.layers.0.") for name in members)


def test_adapters_and_convolutions_are_not_matrices():
    assert kind_of("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 8)) == "matrix"
    assert kind_of("vision_tower.patch_embedding.weight", torch.zeros(8, 3, 4, 4)) == "other"


def test_muon_takes_the_matrices_and_adamw_the_rest():
    optimizers = build_optimizers(Toy(), OptimConfig(weight_decay=0.1), tokens_per_batch=512)
    assert [type(optimizer) for optimizer in optimizers] == [Muon, torch.optim.AdamW]
    found = {
        group["kind"]: (group["base_lr"], group["lr"], group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
    }
    assert found == {
        "matrix": (0.01, 0.01, 0.1),
        "embedding": (0.004, 0.004, 0.0),
        "norm": (0.005, 0.005, 0.0),
        "other": (0.004, 0.004, 0.1),
    }
    assert optimizers[1].param_groups[0]["fused"] is True


def test_a_run_without_settings_gets_the_defaults_that_published_figures_were_measured_with():
    muon, adamw = build_optimizers(Toy(), OptimConfig(), tokens_per_batch=512)
    assert {name: muon.param_groups[0][name] for name in OF_MUON} == {
        "momentum": 0.95,
        "momentum_start": 0.85,
        "momentum_warmup_steps": 300,
        "polynomial": "polar_express",
        "newton_schulz_steps": 5,
        "update_scale": "original",
    }
    for group in adamw.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-10)
    assert {group["weight_decay"] for group in (*muon.param_groups, *adamw.param_groups)} == {0.05, 0.0}


def test_every_setting_reaches_its_optimizer():
    chosen = {
        "momentum": 0.9,
        "momentum_start": 0.8,
        "momentum_warmup_steps": 7,
        "polynomial": "quintic",
        "newton_schulz_steps": 3,
        "update_scale": "match_rms_adamw",
    }
    assert set(chosen) == set(OF_MUON)
    rates = {"matrix_lr": 0.1, "embedding_lr": 0.2, "norm_lr": 0.3, "router_lr": 0.4}
    config = OptimConfig(**chosen, **rates, betas=(0.7, 0.8), eps=1e-6)
    muon, adamw = build_optimizers(mixture(), config, tokens_per_batch=512)
    assert {name: muon.param_groups[0][name] for name in OF_MUON} == chosen
    for group in adamw.param_groups:
        assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-6)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            assert group["lr"] == group["base_lr"] == rates[f"{group['kind']}_lr"]


def test_adamw_takes_everything_with_one_rate_unless_told():
    config = OptimConfig(optimizer="adamw", matrix_lr=5e-4, norm_lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    (optimizer,) = build_optimizers(Toy(), config, tokens_per_batch=512)
    assert type(optimizer) is torch.optim.AdamW
    rates = {group["kind"]: (group["base_lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates == {
        "matrix": (5e-4, 0.1),
        "embedding": (5e-4, 0.0),
        "norm": (1e-3, 0.0),
        "other": (5e-4, 0.1),
    }
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    (plain,) = build_optimizers(Toy(), OptimConfig(optimizer="adamw"), tokens_per_batch=512)
    assert {group["lr"] for group in plain.param_groups} == {0.002}


def mixture():
    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, noisy=True)
    return CausalLM(ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, experts=experts))


def test_kinds_of_a_mixture_of_experts():
    model = mixture()
    groups = {kind: [name for name, _ in members] for kind, members in parameter_groups(model).items()}
    mlp = "model.layers.0.mlp."
    assert groups["router"] == [f"{mlp}gate.weight", f"{mlp}gate.noise_weight"]
    assert {f"{mlp}experts.{name}_proj" for name in ("gate", "up", "down")} <= set(groups["matrix"])
    assert not groups["other"]
    muon, adamw = build_optimizers(model, OptimConfig(), tokens_per_batch=512)
    assert [group["kind"] for group in muon.param_groups] == ["matrix"]
    (router,) = (group for group in adamw.param_groups if group["kind"] == "router")
    assert (router["lr"], router["weight_decay"]) == (0.001, 0.05)


def test_batch_size_rule_by_hand():
    # sqrt(131072 / 524288) = sqrt(1 / 4) = 1 / 2.
    config = OptimConfig(matrix_lr=0.02, embedding_lr=0.004, norm_lr=0.01, reference_batch_tokens=524288)
    assert config.learning_rates(131072, trained=False) == pytest.approx((0.01, 0.002, 0.005, 0.0005))
    assert config.learning_rates(524288, trained=False) == pytest.approx((0.02, 0.004, 0.01, 0.001))
    assert OptimConfig(matrix_lr=0.02).learning_rates(131072, trained=False)[0] == 0.02  # no reference, no rule


def test_a_trained_model_has_a_fifth_of_the_rates_that_are_not_given():
    # 0.01 / 5, 0.004 / 5, 0.005 / 5, 0.001 / 5; with AdamW 0.002 / 5 for all.
    assert OptimConfig().learning_rates(512, trained=True) == pytest.approx((0.002, 0.0008, 0.001, 0.0002))
    assert OptimConfig(optimizer="adamw").learning_rates(512, trained=True) == pytest.approx([0.0004] * 4)
    given = OptimConfig(optimizer="adamw", matrix_lr=0.03, norm_lr=0.01)
    assert given.learning_rates(512, trained=True) == (0.03, 0.03, 0.01, 0.03)
    optimizers = build_optimizers(Toy(), OptimConfig(), tokens_per_batch=512, trained=True)
    rates = {group["kind"]: group["base_lr"] for optimizer in optimizers for group in optimizer.param_groups}
    assert rates["matrix"] == pytest.approx(0.002)
    assert rates["embedding"] == pytest.approx(0.0008)


def test_updates_as_large_as_adamws_take_adamws_learning_rate():
    for trained in (False, True):
        muon, *others = OptimConfig(update_scale="match_rms_adamw").learning_rates(512, trained=trained)
        assert muon == OptimConfig(optimizer="adamw").learning_rates(512, trained=trained)[0]
        assert others == list(OptimConfig().learning_rates(512, trained=trained)[1:])
    assert OptimConfig(update_scale="match_rms_adamw", matrix_lr=0.003).learning_rates(512, trained=True)[0] == 0.003


def test_set_learning_rates_multiplies_the_peaks():
    optimizers = build_optimizers(Toy(), OptimConfig(), tokens_per_batch=512)
    for factor in (0.5, 0.1):  # not cumulative
        set_learning_rates(optimizers, factor)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["lr"] == group["base_lr"] * 0.1


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_resuming_from_named_state_is_bitwise(name):
    config = OptimConfig(optimizer=name, **({"momentum_warmup_steps": 6} if name == "muon" else {}))
    straight = Toy()
    train(straight, build_optimizers(straight, config, tokens_per_batch=512), range(6))

    first = Toy()
    optimizers = build_optimizers(first, config, tokens_per_batch=512)
    train(first, optimizers, range(3))
    weights = {key: value.clone() for key, value in first.state_dict().items()}
    state = {key: {k: v.clone() for k, v in entries.items()} for key, entries in named_state(optimizers).items()}
    assert set(state) == {key for key, _ in first.named_parameters()}

    second = Toy(seed=1)
    second.load_state_dict(weights)
    optimizers = build_optimizers(second, config, tokens_per_batch=512)
    load_named_state(optimizers, state)
    train(second, optimizers, range(3, 6))
    for key, value in second.state_dict().items():
        assert torch.equal(value, straight.state_dict()[key]), key


def test_state_dict_round_trips_bitwise():
    model = Toy()
    optimizers = build_optimizers(model, OptimConfig(), tokens_per_batch=512)
    train(model, optimizers, range(2))
    other = build_optimizers(Toy(), OptimConfig(), tokens_per_batch=512)
    for optimizer, target in zip(optimizers, other, strict=True):
        saved = optimizer.state_dict()
        target.load_state_dict(saved)
        loaded = target.state_dict()
        assert loaded["param_groups"] == saved["param_groups"]
        for index, entries in saved["state"].items():
            for key, value in entries.items():
                assert torch.equal(loaded["state"][index][key], value)


def test_state_by_name_survives_another_order_of_parameters():
    model = Toy()
    optimizers = build_optimizers(model, OptimConfig(), tokens_per_batch=512)
    train(model, optimizers, range(2))
    state = named_state(optimizers)
    reordered = Toy()
    layers = reordered.model._modules.pop("layers")
    reordered.model._modules["layers"] = layers  # layers now come after the norm
    fresh = build_optimizers(reordered, OptimConfig(), tokens_per_batch=512)
    assert names(fresh)["norm"] != names(optimizers)["norm"]
    load_named_state(fresh, state)
    for key, entries in named_state(fresh).items():
        for entry, value in entries.items():
            assert torch.equal(value, state[key][entry]), (key, entry)


def test_state_of_another_model_or_optimizer_is_refused():
    model = Toy()
    optimizers = build_optimizers(model, OptimConfig(), tokens_per_batch=512)
    train(model, optimizers, range(1))
    state = named_state(optimizers)
    with pytest.raises(UserError, match=r"resume with the run's optim\.optimizer"):
        load_named_state(build_optimizers(Toy(), OptimConfig(optimizer="adamw"), tokens_per_batch=512), state)
    with pytest.raises(UserError, match=r"model\.layers\.7\.q_proj\.weight .1 such."):
        load_named_state(optimizers, {**state, "model.layers.7.q_proj.weight": {}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"matrix_lr": -1.0}, "matrix_lr"),
        ({"router_lr": -1.0}, "router_lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"momentum_start": 1.0}, "momentum_start"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"reference_batch_tokens": 0}, "reference_batch_tokens"),
        ({"momentum_warmup_steps": -1}, "momentum_warmup_steps"),
    ],
)
def test_impossible_values_are_named(values, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**values)


@pytest.mark.parametrize("eps", [0.0, -1e-8])
def test_an_eps_that_divides_by_zero_is_refused(eps):
    with pytest.raises(UserError, match=rf"optim\.eps is {eps}: give more than 0"):
        OptimConfig(eps=eps)
