"""Our logits are transformers', for every class we map to, both ways."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_helpers import FakeTokenizer, randomized, row_logits, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minnow.model.config import RopeScaling
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM

CLASSES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
SCALINGS = {
    "linear": RopeScaling(type="linear", factor=4.0, original_max_position_embeddings=16),
    "yarn": RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0),
    "yarn-sharper": RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.14),
    "llama3": RopeScaling(type="llama3", factor=8.0, original_max_position_embeddings=16),
}


@st.composite
def shapes(draw) -> dict:
    key_heads = draw(st.integers(1, 3))
    heads = key_heads * draw(st.integers(1, 3))
    kind = draw(st.sampled_from(sorted(CLASSES)))
    head_dim = 2 * draw(st.integers(1, 12))
    hidden = heads * head_dim
    if kind == "qwen3":  # the only class that takes any head_dim with any width
        hidden = draw(st.integers(8, 64))
    elif kind == "llama":
        hidden = heads * draw(st.integers(2, 16))
    return {
        "vocab_size": draw(st.integers(7, 120)),
        "hidden_size": hidden,
        "intermediate_size": draw(st.integers(8, 96)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "rope_theta": draw(st.sampled_from([1e4, 1e5, 1e6])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()),
        "qk_norm": kind == "qwen3",
        "attention_bias": kind == "qwen2",
    }


def theirs(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@given(shape=shapes(), rows=st.integers(1, 3), length=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ours_saved_reads_the_same_in_transformers(tmp_path, shape, rows, length, seed):
    model = tiny_model(seed, **shape)
    tokens = torch.randint(0, shape["vocab_size"], (rows, length))
    save_pretrained(model, tmp_path / "model", FakeTokenizer())
    reference = theirs(tmp_path / "model")
    expected_class = "Qwen3" if shape["qk_norm"] else "Qwen2" if shape["attention_bias"] else "Llama"
    assert type(reference).__name__ == f"{expected_class}ForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(row_logits(model, tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)
    again = load_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_theirs_saved_reads_the_same_in_ours(tmp_path, kind, tied):
    config_class, model_class = CLASSES[kind]
    shape = {
        "vocab_size": 101, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    }  # fmt: skip
    if kind == "qwen3":
        shape["head_dim"] = 14
    reference = randomized(model_class(config_class(**shape))).eval()
    reference.save_pretrained(tmp_path)
    tokens = torch.randint(0, 101, (2, 33))
    with torch.no_grad():
        ours = row_logits(load_pretrained(tmp_path), tokens)
        torch.testing.assert_close(ours, reference(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(SCALINGS))
def test_scaled_rope_is_theirs(tmp_path, name):
    model = tiny_model(rope_scaling=SCALINGS[name], head_dim=24)
    tokens = torch.randint(0, 97, (1, 64))
    save_pretrained(model, tmp_path / "model")
    with torch.no_grad():
        expected = theirs(tmp_path / "model")(tokens).logits
        torch.testing.assert_close(row_logits(model, tokens), expected, atol=1e-4, rtol=1e-4)
    assert load_pretrained(tmp_path / "model").config == model.config


def test_config_json_of_transformers_4_is_read(tmp_path):
    """Version 4 writes rope_theta and rope_scaling at the top, and no rope_parameters."""
    scaling = RopeScaling(type="llama3", factor=8.0, original_max_position_embeddings=16)
    model = tiny_model(rope_scaling=scaling, rope_theta=5e5, qk_norm=False)
    save_pretrained(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    assert (content["rope_theta"], content["torch_dtype"], content["head_dim"]) == (5e5, "float32", 16)
    del content["rope_parameters"], content["dtype"]
    path.write_text(json.dumps(content))
    assert load_pretrained(tmp_path / "model").config == model.config


def test_generate_of_transformers_stops_by_itself(tmp_path):
    """A model whose next token is always the present one plus one counts up to im_end (2) and no further."""
    model = CausalLM(tiny_config(vocab_size=16, hidden_size=16, tie_word_embeddings=False))
    successor = {5: 6, 6: 7, 7: 2, 2: 9, 9: 9, 8: 0, 0: 9}
    with torch.no_grad():
        # The layers start as the identity (zero output projections): the head alone decides.
        model.model.embed_tokens.weight.copy_(torch.eye(16))
        model.lm_head.weight.zero_()
        for token, following in successor.items():
            model.lm_head.weight[following, token] = 1.0
    save_pretrained(model, tmp_path / "model", FakeTokenizer())
    reference = theirs(tmp_path / "model")
    assert reference.generation_config.eos_token_id == [2, 0]
    assert reference.generation_config.pad_token_id == 0
    out = reference.generate(torch.tensor([[5], [8]]), max_new_tokens=10, do_sample=False)
    assert out.tolist() == [[5, 6, 7, 2], [8, 0, 0, 0]]
