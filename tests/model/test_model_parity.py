"""Our logits are transformers', for every class we map to, both ways."""

from __future__ import annotations

import dataclasses
import json
import shutil

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_helpers import (
    FakeTokenizer,
    assert_same_logits,
    assert_same_model,
    randomized,
    reach,
    scalings,
    tiny_config,
    tiny_model,
    written_scaling,
)
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
from minnow.model.norm import RMSNorm
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM

CLASSES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


@st.composite
def shapes(draw, kind: str | None = None) -> dict:
    kind = kind or draw(st.sampled_from(sorted(CLASSES)))
    key_heads = draw(st.integers(1, 3))
    heads = key_heads * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 12))
    hidden = heads * head_dim
    if kind == "qwen3":  # the only class that takes any head_dim with any width
        hidden = draw(st.integers(8, 64))
    elif kind == "llama":
        hidden = heads * draw(st.integers(2, 16))
    output_bias = kind != "qwen2" and draw(st.booleans())
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
        "attention_bias": kind == "qwen2" or output_bias,
        "attention_output_bias": output_bias,
        "mlp_bias": kind == "llama" and draw(st.booleans()),
    }


def theirs(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@given(
    shape=shapes(),
    scaling=scalings(),
    rows=st.integers(1, 3),
    length=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ours_saved_reads_the_same_in_transformers(tmp_path, shape, scaling, rows, length, seed):
    model = tiny_model(seed, rope_scaling=scaling, max_position_embeddings=reach(scaling), **shape)
    save_pretrained(model, tmp_path / "model", FakeTokenizer())
    reference = theirs(tmp_path / "model")
    is_qwen2 = shape["attention_bias"] and not shape["attention_output_bias"]
    expected_class = "Qwen3" if shape["qk_norm"] else "Qwen2" if is_qwen2 else "Llama"
    assert type(reference).__name__ == f"{expected_class}ForCausalLM"
    tokens = torch.randint(0, shape["vocab_size"], (rows, length))
    assert_same_logits(model, reference, tokens)
    again = load_pretrained(tmp_path / "model")
    if scaling is not None and scaling.type == "linear":  # the files do not say which length linear started from
        again.config = dataclasses.replace(again.config, rope_scaling=scaling)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@given(kind=st.sampled_from(sorted(CLASSES)), length=st.integers(1, 40), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_theirs_saved_reads_the_same_in_ours_and_back(tmp_path, kind, length, seed, data):
    config_class, model_class = CLASSES[kind]
    shape, scaling = data.draw(shapes(kind)), data.draw(scalings())
    rope = written_scaling(scaling)
    if rope["rope_type"] == "yarn" and data.draw(st.booleans()):
        del rope["attention_factor"]  # theirs then is the paper's
    theta = shape.pop("rope_theta")
    output_bias, mlp_bias = shape.pop("attention_output_bias"), shape.pop("mlp_bias")
    shape |= {"attention_bias": output_bias} if kind != "qwen2" else {}
    shape |= {"mlp_bias": mlp_bias} if kind == "llama" else {}
    removed = {"qk_norm"} | ({"attention_bias", "head_dim"} if kind == "qwen2" else set())
    shape = {key: value for key, value in shape.items() if key not in removed}
    config = config_class(**shape, max_position_embeddings=64, rope_parameters=rope | {"rope_theta": theta})
    reference = randomized(model_class(config), seed).eval()
    shutil.rmtree(tmp_path / "theirs", ignore_errors=True)  # of the example before
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=data.draw(st.sampled_from(["4KB", "1GB"])))
    ours = load_pretrained(tmp_path / "theirs")
    tokens = torch.randint(0, shape["vocab_size"], (2, length))
    assert_same_logits(ours, reference, tokens)
    save_pretrained(ours, tmp_path / "back")
    assert_same_model(theirs(tmp_path / "back"), reference, tokens)


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


def test_the_norm_is_computed_in_fp32_and_rounded_once():
    norm = randomized(RMSNorm(64, 1e-5))  # fp32, as in training in bf16
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) == exact.bfloat16()).float().mean() > 0.999
