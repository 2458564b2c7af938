"""A stretched context has transformers' numbers, whatever the settings."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_helpers import row_logits, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minnow.config import UserError
from minnow.model.attention import CausalAttention
from minnow.model.context import ContextConfig, extend_context
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.rope import rotary_tables


def our_tables(config, length):
    cos, sin = rotary_tables(torch.arange(length)[None], config.head_dim, config.rope_theta, config.rope_scaling)
    return cos[0, :, 0], sin[0, :, 0]


def their_tables(config, rope, length, **more):
    hf = Qwen3Config(
        head_dim=config.head_dim, max_position_embeddings=config.max_position_embeddings, rope_parameters=rope
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf, "cpu", **more)
    angles = torch.arange(length)[:, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


trained = st.builds(
    tiny_config,
    head_dim=st.integers(2, 64).map(lambda half: 2 * half),
    rope_theta=st.floats(100, 1e6),
    max_position_embeddings=st.integers(8, 4096),
)


@given(config=trained, factor=st.floats(1, 32), kind=st.sampled_from(["linear", "yarn"]))
@settings(max_examples=60, deadline=None)
def test_linear_and_yarn_are_theirs(config, factor, kind):
    """Factor and trained length alone given: the rest is what transformers takes for itself."""
    stretched = extend_context(config, kind, factor)
    longest, trained_length = stretched.max_position_embeddings, config.max_position_embeddings
    assert longest == round(factor * trained_length)
    assert stretched.rope_scaling.factor == longest / trained_length  # transformers 4 computes it so
    rope = {"rope_type": kind, "rope_theta": config.rope_theta, "factor": longest / trained_length}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = config.max_position_embeddings
    for ours, theirs in zip(our_tables(stretched, 300), their_tables(config, rope, 300), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@given(config=trained, factor=st.floats(1, 32), theirs_factor=st.floats(1, 8))
@settings(max_examples=60, deadline=None)
def test_ntk_is_their_dynamic_at_that_length(config, factor, theirs_factor):
    """Theirs multiplies the base by (f L / L0 - f + 1)^(d / (d - 2)), ours by factor^(d / (d - 2))."""
    stretched = extend_context(config, "ntk", factor)
    assert stretched.rope_scaling is None
    length = torch.tensor(config.max_position_embeddings * (factor + theirs_factor - 1) / theirs_factor).double()
    rope = {"rope_type": "dynamic", "rope_theta": config.rope_theta, "factor": theirs_factor}
    expected = their_tables(config, rope, 300, seq_len=length)
    for ours, theirs in zip(our_tables(stretched, 300), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@given(kind=st.sampled_from(["yarn", "linear", "ntk"]), factor=st.floats(1, 8), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stretched_model_saved_is_stretched_in_transformers(tmp_path, kind, factor, seed):
    model = tiny_model(seed, max_position_embeddings=16)
    model.config = extend_context(model.config, kind, factor)
    longest = model.config.max_position_embeddings
    save_pretrained(model, tmp_path / "model")
    tokens = torch.randint(0, 97, (2, longest))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert theirs.config.max_position_embeddings == longest
    with torch.no_grad():
        torch.testing.assert_close(row_logits(model, tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
        again = load_pretrained(tmp_path / "model")
        torch.testing.assert_close(row_logits(again, tokens), row_logits(model, tokens), atol=1e-5, rtol=1e-5)


def test_by_hand():
    config = tiny_config(head_dim=4, rope_theta=10_000.0, max_position_embeddings=64)
    # Frequencies 1 and 10,000^(-2/4) = 0.01. Linear by 4: all of them a quarter.
    cos, _ = our_tables(extend_context(config, "linear", 4), 2)
    torch.testing.assert_close(cos[1], torch.tensor([0.25, 0.0025]).cos())
    # NTK by 4: the base times 4^(4/2) = 16, so 1 stays and 160,000^(-1/2) = 0.0025 is a quarter of 0.01.
    stretched = extend_context(config, "ntk", 4)
    assert stretched.rope_theta == pytest.approx(160_000)
    torch.testing.assert_close(our_tables(stretched, 2)[0][1], torch.tensor([1.0, 0.0025]).cos())


def test_what_cannot_be_stretched_is_refused():
    config = tiny_config(max_position_embeddings=16)
    with pytest.raises(UserError, match="yarn by 4 already .max_position_embeddings 64.: it cannot be stretched twice"):
        extend_context(extend_context(config, "yarn", 4), "linear", 2)
    with pytest.raises(UserError, match=r"--factor 0\.5"):
        extend_context(config, "ntk", 0.5)
    with pytest.raises(UserError, match="--factor 0: "):  # it was taken for "not given"
        ContextConfig(rope_scaling="yarn", factor=0.0).extend(config)
    with pytest.raises(UserError, match="--factor inf: "):
        extend_context(config, "yarn", math.inf)
    with pytest.raises(UserError, match="--factor 2 needs --rope-scaling"):
        ContextConfig(factor=2.0).extend(config)
    with pytest.raises(UserError, match="head_dim of at least 4"):
        extend_context(dataclasses.replace(config, head_dim=2), "ntk", 4)


def test_a_stretched_model_is_not_told_to_stretch():
    """What extend_context refuses is no advice."""
    plain = tiny_config(max_position_embeddings=16)
    with pytest.raises(
        UserError, match=r"20 tokens .* \(16\): .* stretch the context \(--rope-scaling yarn --factor 4\)"
    ):
        plain.check_sequence_length(20)
    with pytest.raises(UserError, match=r"\(64\): shorten it \(rope_scaling yarn by 4 is counted in\)$"):
        extend_context(plain, "yarn", 4).check_sequence_length(70)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("written", [16, 40, 64, 100])
def test_a_yarn_with_its_trained_length_reads_as_far_as_it_says(tmp_path, version, written):
    """Qwen's documented form: rope_scaling alone is added, and max_position_embeddings may stay what it was."""
    save_pretrained(tiny_model(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text()) | {"max_position_embeddings": written}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    content["rope_scaling" if version == 4 else "rope_parameters"] = yarn
    content["rope_parameters" if version == 4 else "rope_scaling"] = None
    file.write_text(json.dumps(content))
    ours = load_pretrained(tmp_path / "model")
    assert ours.config.max_position_embeddings == max(written, 64)
    tokens = torch.randint(0, 97, (2, 64))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(row_logits(ours, tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    # Without a trained length of its own transformers takes max_position_embeddings for it, and so do we.
    del yarn["original_max_position_embeddings"]
    file.write_text(json.dumps(content))
    config = load_pretrained(tmp_path / "model").config
    assert config.max_position_embeddings == config.rope_scaling.original_max_position_embeddings == written


def test_the_factor_is_the_users_or_the_stages():
    config = tiny_config(max_position_embeddings=16)
    assert ContextConfig().extend(config) == config
    assert ContextConfig(rope_scaling="yarn").extend(config).max_position_embeddings == 64
    assert ContextConfig(rope_scaling="yarn").extend(config, factor=3).max_position_embeddings == 48
    assert ContextConfig(rope_scaling="yarn", factor=2).extend(config, factor=3).max_position_embeddings == 32


def test_training_speaks_of_the_length_that_was_given():
    """It said "--factor 0.5" to a user who gave none, and told to stretch what cannot be stretched twice."""
    config = tiny_config(max_position_embeddings=16)
    yarn = ContextConfig(rope_scaling="yarn")
    assert yarn.extend_for(config, 48).rope_scaling.factor == 3
    for length in (8, 16):
        with pytest.raises(UserError, match=f"^--sequence-length {length}: the model reads 16 tokens as it is; "):
            yarn.extend_for(config, length)
    # A factor of the user's own may leave the rows of this run behind.
    assert ContextConfig(rope_scaling="yarn", factor=4).extend_for(config, 16).max_position_embeddings == 64
    with pytest.raises(UserError, match=r"^--sequence-length 48: .* 16 or less, or teach .* --rope-scaling yarn\)$"):
        ContextConfig().extend_for(config, 48)
    with pytest.raises(
        UserError, match=r"^--sequence-length 48: .* 32 or less \(rope_scaling yarn by 2 is counted in\)$"
    ):
        ContextConfig(rope_scaling="yarn", factor=2).extend_for(config, 48)


def test_an_examination_may_look_beyond_the_trained_length():
    model = tiny_model(max_position_embeddings=16)
    tokens, positions = torch.zeros(1, 20, dtype=torch.int64), torch.arange(20)[None]
    with pytest.raises(UserError, match="20 tokens"):
        model(tokens, positions, CausalAttention())
    model(tokens, positions, CausalAttention(), allow_beyond_trained_length=True)
