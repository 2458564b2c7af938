"""config.json: what is read as its class reads it, and what is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import FakeTokenizer, assert_same_logits, change_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from minnow.config import UserError
from minnow.model.hf_config import from_hf_config
from minnow.model.pretrained import load_pretrained, save_pretrained


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "model", FakeTokenizer())
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
            "MambaForCausalLM .* is not supported; these are: Qwen3ForCausalLM",
        ),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "a reward model"),
        ({"attention_bias": True}, r"missing model\.layers\.0\.self_attn\.q_proj\.bias"),  # read, so they must be there
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None},
            "layers of sliding_attention .*use_sliding_window True, sliding_window 8, max_window_layers 2",
        ),
        ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layers of sliding_attention"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layers of chunked_attention"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"is_causal": False}, "is_causal = False"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "no hidden_size in it"),
        ({"hidden_size": "256"}, r"config\.json: hidden_size = '256' is not a whole number"),
        ({"vocab_size": 1.5}, "vocab_size = 1.5 is not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True is not a whole number"),
        ({"head_dim": [16]}, r"head_dim = \[16\] is not a whole number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' is not true or false"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small' is not a number"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn' is not an object"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
            "factor = 'two' in the rope's parameters is not a",
        ),
        ({"head_dim": 15}, r"config\.json: model\.head_dim is 15"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'.*--rope-scaling ntk"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs a factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by layer type"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "without truncation"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "yarn with mscale"),
    ],
)
def test_configs_we_do_not_compute_are_refused(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, YARN),  # what a user adds to a file of transformers 5
        (YARN | {"rope_theta": 1e4}, {"rope_type": "default"}),
        (YARN | {"rope_theta": 1e4}, YARN | {"factor": 2.0}),
        (YARN | {"rope_theta": 1e4}, YARN | {"attention_factor": 1.0}),
        (YARN | {"rope_theta": 1e4}, YARN | {"rope_type": "linear"}),
        (YARN | {"rope_theta": 1e6}, YARN),  # rope_theta at the top, 1e4, goes with the second
    ],
)
def test_rope_parameters_and_rope_scaling_that_differ_are_refused(folder, parameters, scaling):
    change_config(folder, rope_parameters=parameters, rope_scaling=scaling)
    with pytest.raises(UserError, match=r"config\.json: rope_parameters .* and rope_scaling .* contradict each other"):
        load_pretrained(folder)


def test_rope_parameters_and_rope_scaling_that_agree_are_read(folder):
    """Agree in what they mean: transformers 4's name of the type, and defaults written out in one of them."""
    written = {"type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 16}
    change_config(folder, rope_parameters=YARN | {"rope_theta": 1e4}, rope_scaling=written)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_pretrained(folder)
    assert (ours.config.rope_scaling.type, ours.config.rope_scaling.factor) == ("yarn", 4.0)
    assert_same_logits(ours, theirs, torch.randint(0, 97, (2, 60)))


WINDOWS = st.fixed_dictionaries(
    {},
    optional={
        "use_sliding_window": st.booleans(),
        "sliding_window": st.sampled_from([None, 4]),
        "max_window_layers": st.integers(0, 4),
        "layer_types": st.none() | st.lists(st.sampled_from(["full_attention"] * 3 + ["sliding_attention"])),
    },
)


@given(config_class=st.sampled_from([LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig]), keys=WINDOWS)
@settings(max_examples=200, deadline=None)
def test_a_window_is_refused_where_a_layer_slides(config_class, keys):
    """The layers' kinds are those that transformers' class derives from the same keys."""
    if keys.get("layer_types") is not None:
        keys["layer_types"] = (keys["layer_types"] + ["full_attention"] * 3)[:3]
    shape = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    }  # fmt: skip
    theirs = config_class(**shape, **keys)
    slides = config_class in (Qwen2Config, Qwen3Config) and "sliding_attention" in theirs.layer_types
    if config_class is Qwen3MoeConfig:
        slides = theirs.sliding_window is not None  # all that its class looks at
    content = shape | keys | {"model_type": config_class.model_type}
    if slides:
        with pytest.raises(UserError, match=r"^config\.json: layers of sliding_attention are not supported"):
            from_hf_config(content, "config.json")
    else:
        assert from_hf_config(content, "config.json").num_hidden_layers == 3


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": None, "max_window_layers": 0, "layer_types": None},
        {"sliding_window": 4, "max_window_layers": 3, "layer_types": None},
        {"sliding_window": 4, "max_window_layers": 0, "layer_types": ["full_attention"] * 3},
    ],
)
def test_a_window_that_no_layer_has_is_read(folder, keys):
    change_config(folder, use_sliding_window=True, **keys)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_same_logits(load_pretrained(folder), theirs, torch.randint(0, 97, (2, 40)))


def test_what_changes_no_number_is_read(folder):
    """Values at which a class computes what ours computes, and attributes that it does not look at."""
    expected = load_pretrained(folder).config
    change_config(
        folder, hidden_act="swish", pretraining_tp=2, attention_dropout=0, partial_rotary_factor=None,
        layer_types=["full_attention"] * 3, sliding_window=4096, max_window_layers=28, initializer_range=0.1,
    )  # fmt: skip
    assert load_pretrained(folder).config == expected


READ = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters attention_bias mlp_bias
    num_experts n_routed_experts num_experts_per_tok moe_intermediate_size norm_topk_prob mlp_only_layers
    decoder_sparse_step n_shared_experts first_k_dense_replace routed_scaling_factor n_group topk_group use_qk_norm"""
REFUSED = """hidden_act attention_dropout is_causal add_cross_attention pruned_heads
    use_sliding_window sliding_window max_window_layers layer_types"""
# The last of them counts layers that guess further ahead: a checkpoint's weights for them are refused as unexpected.
OF_NO_WEIGHT = """initializer_range use_cache bos_token_id eos_token_id pad_token_id pretraining_tp output_router_logits
    router_aux_loss_coef num_mtp_layers"""


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig, Glm4MoeConfig])
def test_every_attribute_of_the_classes_is_dealt_with(config_class):
    """One that a later transformers adds is looked at here before anybody's checkpoint is misread."""
    own = {f.name for f in dataclasses.fields(config_class)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    assert own - set(f"{READ} {REFUSED} {OF_NO_WEIGHT}".split()) == set()
