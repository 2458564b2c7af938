"""A key that config.json leaves out is what transformers' own class takes for it."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import Glm4MoeConfig, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from minnow.config import UserError
from minnow.model.hf_config import from_hf_config
from minnow.model.hf_defaults import DEFAULTS

CLASSES = (LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig, Glm4MoeConfig)
NEEDED = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 64,
}  # fmt: skip
# No class's default among them, so that each shows when it goes.
OTHERS = {
    "num_key_value_heads": 16,
    "head_dim": 4,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "use_sliding_window": False,
    "num_experts": 24,
    "n_routed_experts": 24,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": None,  # the class's other one
    "mlp_only_layers": [0],
    "use_qk_norm": True,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
}
# What changes no shape or is refused at any other value.
ONE_VALUE = {"rope_theta", "partial_rotary_factor", "sliding_window", "max_window_layers", "decoder_sparse_step"}


def others(config_class) -> dict:
    """A file of this class where every key says something else than its default."""
    own = {field.name for field in dataclasses.fields(config_class)}
    content = NEEDED | {key: value for key, value in OTHERS.items() if key in own}
    if "norm_topk_prob" in content:
        content["norm_topk_prob"] = not config_class().norm_topk_prob
    if config_class is Qwen2Config:
        content.pop("head_dim", None)
    if config_class is Glm4MoeConfig:
        content |= {"partial_rotary_factor": 1.0}
    return content


def both(config_class, content: dict, rope: dict | None):
    """Our shape from the bare content, and from what the class makes of it with all its defaults written out."""
    bare = content | {"model_type": config_class.model_type} | ({"rope_parameters": rope} if rope else {})
    written = config_class(**content, **({"rope_parameters": dict(rope)} if rope else {})).to_dict()
    assert written["model_type"] == config_class.model_type
    return from_hf_config(bare, "bare"), from_hf_config(written, "written")


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {"rope_theta": 5e5},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0},
    ],
)
@pytest.mark.parametrize("config_class", CLASSES)
def test_every_absent_key_is_the_classes_default(config_class, rope):
    """One key left out at a time, then all of them: the class itself says what it takes for them."""
    content = others(config_class)
    ours, theirs = both(config_class, content, rope)
    assert ours == theirs
    for key in sorted(content.keys() - NEEDED.keys() - ONE_VALUE):
        gone = {key, "topk_group"} if key == "n_group" else {key}  # of one group no two can be chosen
        shorter = {k: value for k, value in content.items() if k not in gone}
        ours, theirs = both(config_class, shorter, rope)
        assert ours == theirs, key
    least = {key: value for key, value in content.items() if key in NEEDED or key == "partial_rotary_factor"}
    ours, theirs = both(config_class, least, rope)
    assert ours == theirs


@pytest.mark.parametrize("config_class", CLASSES)
def test_the_table_is_the_classes(config_class):
    """The same by name, and nothing in the table that the test above leaves in its place."""
    ours, theirs = DEFAULTS[config_class.model_type], config_class()
    declared = {field.name: field.default for field in dataclasses.fields(config_class)}
    declared |= {"partial_rotary_factor": 1.0} | theirs.rope_parameters
    declared |= {key: getattr(theirs, key) for key in ours.keys() & {"mlp_only_layers"}}  # made in __post_init__
    assert ours == {key: declared[key] for key in ours}
    assert ours.keys() <= others(config_class).keys() | ONE_VALUE


def test_what_a_class_has_no_default_for_is_asked_for():
    content = NEEDED | {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(UserError, match="'llama3' needs a low_freq_factor, a high_freq_factor"):
        from_hf_config(content, "config.json")


def test_glm_turns_half_a_head_where_nothing_else_is_written():
    with pytest.raises(UserError, match="partial_rotary_factor = 0.5"):
        from_hf_config(others(Glm4MoeConfig) | {"model_type": "glm4_moe", "partial_rotary_factor": 0.5}, "config.json")
    content = {key: value for key, value in others(Glm4MoeConfig).items() if key != "partial_rotary_factor"}
    with pytest.raises(UserError, match="partial_rotary_factor = 0.5"):
        from_hf_config(content | {"model_type": "glm4_moe"}, "config.json")
