"""Our mixtures of experts are transformers', both ways, over random shapes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_helpers import (
    FakeTokenizer,
    assert_same_logits,
    assert_same_model,
    randomized,
    reach,
    row_logits,
    scalings,
    tiny_model,
    written_scaling,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from minnow.config import UserError
from minnow.model.experts_config import ExpertsConfig
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.stacking import stack_experts, unstack_experts

NO_RESET = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SOFTMAX = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
SIGMOID = ExpertsConfig(
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, scoring="sigmoid", n_shared_experts=2,
    first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=1.5,
)  # fmt: skip


@st.composite
def shapes(draw, scoring: str) -> dict:
    key_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3])) if scoring == "sigmoid" else 1
    chosen_groups = draw(st.integers(1, groups))
    per_group = draw(st.integers(2, 4))
    per_token = draw(st.integers(1, min(4, chosen_groups * per_group)))
    experts = ExpertsConfig(
        num_experts=groups * per_group,
        num_experts_per_tok=per_token,
        moe_intermediate_size=draw(st.integers(3, 40)),
        scoring=scoring,
        norm_topk_prob=draw(st.booleans()),
        n_shared_experts=draw(st.integers(1, 2)) if scoring == "sigmoid" else 0,
        first_k_dense_replace=draw(st.integers(0, layers - 1)),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])) if scoring == "sigmoid" else 1.0,
        n_group=groups,
        topk_group=chosen_groups,
    )
    bias = draw(st.booleans())
    return {
        "vocab_size": draw(st.integers(7, 120)),
        "hidden_size": draw(st.integers(8, 48)),
        "intermediate_size": draw(st.integers(8, 64)),
        "num_hidden_layers": layers,
        "num_attention_heads": key_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": key_heads,
        "head_dim": 2 * draw(st.integers(1, 12)),
        "tie_word_embeddings": draw(st.booleans()),
        "qk_norm": draw(st.booleans()) if scoring == "sigmoid" else True,
        "attention_bias": bias,
        "attention_output_bias": bias and scoring == "softmax",
        "experts": experts,
    }


def theirs(folder) -> torch.nn.Module:
    # Their other implementations refuse widths that are no multiple of 16 bytes.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def moe_model(seed: int = 0, **shape):
    """Random weights, the selection bias too."""
    model = tiny_model(seed, **shape)
    for name, buffer in model.named_buffers():
        assert name.endswith("e_score_correction_bias")
        buffer.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@given(data=st.data(), rows=st.integers(1, 3), length=st.integers(1, 40), seed=st.integers(0, 1000))
@NO_RESET
def test_ours_saved_reads_the_same_in_transformers(tmp_path, scoring, data, rows, length, seed):
    shape, scaling = data.draw(shapes(scoring)), data.draw(scalings())
    model = moe_model(seed, rope_scaling=scaling, max_position_embeddings=reach(scaling), **shape)
    tokens = torch.randint(0, shape["vocab_size"], (rows, length))
    save_pretrained(model, tmp_path / "model", FakeTokenizer())
    reference = theirs(tmp_path / "model")
    assert type(reference).__name__ == ("Qwen3MoeForCausalLM" if scoring == "softmax" else "Glm4MoeForCausalLM")
    assert_same_logits(model, reference, tokens)
    again = load_pretrained(tmp_path / "model")
    if scaling is not None and scaling.type == "linear":  # the files do not say which length linear started from
        again.config = dataclasses.replace(again.config, rope_scaling=scaling)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def their_model(shape: dict, rope: dict, seed: int) -> torch.nn.Module:
    """The shape in the words of transformers' own classes, with random weights and selection biases."""
    experts: ExpertsConfig = shape["experts"]
    ours = ("experts", "qk_norm", "attention_output_bias")
    shared = {key: value for key, value in shape.items() if key not in ours} | {"max_position_embeddings": 64}
    for key in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
        shared[key] = getattr(experts, key)
    if experts.scoring == "softmax":
        dense = list(range(experts.first_k_dense_replace))
        config = Qwen3MoeConfig(**shared, rope_parameters=rope, num_experts=experts.num_experts, mlp_only_layers=dense)
        config._experts_implementation = "eager"
        return randomized(Qwen3MoeForCausalLM(config), seed).eval()
    for key in ("n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group"):
        shared[key] = getattr(experts, key)
    config = Glm4MoeConfig(
        **shared, rope_parameters=rope | {"partial_rotary_factor": 1.0}, n_routed_experts=experts.num_experts,
        use_qk_norm=shape["qk_norm"],
    )  # fmt: skip
    config._experts_implementation = "eager"
    reference = randomized(Glm4MoeForCausalLM(config), seed).eval()
    for layer in reference.model.layers[experts.first_k_dense_replace :]:
        bias = layer.mlp.gate.e_score_correction_bias
        bias.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    return reference


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@given(data=st.data(), fused=st.booleans(), length=st.integers(1, 40), seed=st.integers(0, 1000))
@NO_RESET
def test_theirs_saved_reads_the_same_in_ours_and_back(tmp_path, scoring, data, fused, length, seed):
    """fused: experts stacked in the file, as transformers 5 has them in memory; else one by one, as 4 wrote them."""
    shape, scaling = data.draw(shapes(scoring)), data.draw(scalings())
    rope = written_scaling(scaling) | {"rope_theta": data.draw(st.sampled_from([1e4, 1e6]))}
    reference = their_model(shape, rope, seed)
    shutil.rmtree(tmp_path / "theirs", ignore_errors=True)  # of the example before
    reference.save_pretrained(
        tmp_path / "theirs", save_original_format=not fused, max_shard_size=data.draw(st.sampled_from(["4KB", "1GB"]))
    )
    stored = {name for file in (tmp_path / "theirs").glob("*.safetensors") for name in load_file(file)}
    assert any(name.endswith("experts.gate_up_proj") for name in stored) == fused
    ours = load_pretrained(tmp_path / "theirs")
    tokens = torch.randint(0, shape["vocab_size"], (2, length))
    assert_same_logits(ours, reference, tokens)
    save_pretrained(ours, tmp_path / "back")
    assert_same_model(theirs(tmp_path / "back"), reference, tokens)


def test_experts_are_stored_one_by_one(tmp_path):
    model = moe_model(experts=SIGMOID)
    save_pretrained(model, tmp_path / "model", FakeTokenizer(), dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.7.gate_proj.weight"].shape == (24, 48)
    assert stored["model.layers.1.mlp.experts.0.down_proj.weight"].shape == (48, 24)
    assert stored["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (48, 48)
    assert "model.layers.0.mlp.gate_proj.weight" in stored  # the first layer is dense
    # Written out although tied, and the bias in full precision: small steps add up in it.
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    bias = stored["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert bias.abs().max() > 0
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (content["architectures"], content["tie_word_embeddings"]) == (["Glm4MoeForCausalLM"], False)
    assert (content["partial_rotary_factor"], content["num_nextn_predict_layers"]) == (1.0, 0)
    again = load_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert again.config.tie_word_embeddings
    assert again.lm_head is None
    assert again.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_a_dozen_experts_are_stacked_by_their_numbers():
    """A file's names come as text is sorted: expert 10 before expert 2."""
    experts = "model.layers.1.mlp.experts"
    gate_EFD, up_EFD, down_EDF = (torch.randn(12, *size) for size in ((3, 2), (3, 2), (2, 3)))
    others = {"model.layers.1.mlp.shared_experts.up_proj.weight": torch.randn(3, 2), "model.norm.weight": torch.ones(2)}
    stacked = {f"{experts}.gate_proj": gate_EFD, f"{experts}.up_proj": up_EFD, f"{experts}.down_proj": down_EDF}
    stacked |= others
    single = dict(sorted(unstack_experts(stacked).items()))
    assert len(single) == 3 * 12 + 2
    assert torch.equal(single[f"{experts}.10.down_proj.weight"], down_EDF[10])
    fused = {
        f"{experts}.gate_up_proj": torch.cat([gate_EFD, up_EFD], dim=1),
        f"{experts}.down_proj": down_EDF,
        **others,
    }
    for stored in (single, fused):
        again = stack_experts(stored)
        assert again.keys() == stacked.keys()
        assert all(torch.equal(tensor, stacked[name]) for name, tensor in again.items())
        assert all(tensor.is_contiguous() for tensor in again.values())


def test_experts_that_do_not_stack_stay_for_the_reader_to_name():
    names = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in range(4)]
    whole = {name: torch.ones(3, 2) for name in names}
    for odd in (whole | {names[3]: torch.ones(2, 2)}, {name: whole[name] for name in names if name != names[1]}):
        assert stack_experts(odd) == odd


def test_noise_folds_away_at_save(tmp_path):
    noisy = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, noisy=True)
    model = moe_model(experts=noisy)
    save_pretrained(model, tmp_path / "model")
    tokens = torch.randint(0, 97, (2, 30))
    reference = theirs(tmp_path / "model")
    assert type(reference).__name__ == "Qwen3MoeForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(row_logits(model, tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not load_pretrained(tmp_path / "model").config.experts.noisy


def test_a_missing_expert_is_named(tmp_path):
    save_pretrained(moe_model(experts=SOFTMAX), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.experts.1.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing model\.layers\.0\.mlp\.experts\.up_proj \(4, 24, 48\)"):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("experts", "changes", "message"),
    [
        (SOFTMAX, {"decoder_sparse_step": 2}, "decoder_sparse_step 2 with mlp_only_layers"),
        (SOFTMAX, {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] is not supported"),
        (SIGMOID, {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor = 0.5"),
        (SIGMOID, {"n_shared_experts": 0}, "n_shared_experts of at least 1"),
    ],
)
def test_unsupported_variants_are_refused_by_name(tmp_path, experts, changes, message):
    save_pretrained(moe_model(experts=experts), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "model")
