"""GGUF files read back: by the `gguf` library, and by transformers, which has a reader of its own."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from export_models import (
    ARCHITECTURES,
    CORPUS,
    EXPERTS,
    MIXED,
    reference_logits,
    seeing_model,
    small_tokenizer,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from minnow import cli
from minnow.config import UserError
from minnow.export.gguf_file import GGUF_TYPES, GgufType, encode, write_gguf
from minnow.export.gguf_tokenizer import LLAMA3_PATTERN, pre_tokenizer
from minnow.export.template import model_name
from minnow.model.config import RopeScaling
from minnow.model.lora import LoraConfig, add_lora
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.vision_language import VisionLanguageModel
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.bytelevel import GPT2_PATTERN, QWEN2_PATTERN
from minnow.tokenizer.template import chat_template


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


READ_BY_TRANSFORMERS = [name for name in ARCHITECTURES if name == "qwen3 moe" or name not in EXPERTS]


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_file_as_the_same_model(name: str, tmp_path: Path) -> None:
    """Names and layouts (Llama's turned rows) of all weights: an independent reader gives minnow's logits.

    It is given the shape, since it knows no head_dim and no rope scaling in GGUF; test_what_the_header_says has those.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tiny_model(tmp_path, **ARCHITECTURES[name])
    write_gguf(folder, tmp_path / "x.gguf", "f32")
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", config=config, dtype=torch.float32)
    ids = [0, 5, 300, 7, 7, 120, 33]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, reference_logits(folder, ids), atol=1e-4)


def test_what_the_header_says(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    folder = tiny_model(tmp_path)
    write_gguf(folder, tmp_path / "x.gguf", "f16")
    found = fields(tmp_path / "x.gguf")
    assert found["general.architecture"] == "qwen3"
    assert found["general.name"] == "run"
    assert found["qwen3.context_length"] == 64
    assert found["qwen3.attention.key_length"] == 16
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "qwen2"
    assert found["tokenizer.ggml.add_bos_token"] is False
    ends = [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "padding")]
    assert ends == [tokenizer.end_of_text_id, tokenizer.im_end_id, tokenizer.im_end_id, tokenizer.pad_id]
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == tokenizer.vocab_size + 3
    assert types[-3:] == [gguf.TokenType.UNUSED] * 3
    assert types[tokenizer.im_end_id] == gguf.TokenType.CONTROL
    assert types[tokenizer.special_ids["<think>"]] == gguf.TokenType.USER_DEFINED
    assert types[tokenizer.encode("a")[0]] == gguf.TokenType.NORMAL
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_every_number_of_the_shape_is_in_the_header(tmp_path: Path) -> None:
    """The readers of test_transformers_reads_the_file are given the shape: a number that is missing shows here."""
    write_gguf(tiny_model(tmp_path, rope_theta=12_345.0, rms_norm_eps=1e-5), tmp_path / "x.gguf", "f16")
    found = fields(tmp_path / "x.gguf")
    expected = {
        "vocab_size": small_tokenizer().vocab_size + 3,
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 16,
        "rope.freq_base": 12_345.0,
    }
    assert {name: found.get(f"qwen3.{name}") for name in expected} == expected


SOFTMAX, SIGMOID = gguf.ExpertGatingFuncType.SOFTMAX, gguf.ExpertGatingFuncType.SIGMOID


@pytest.mark.parametrize(
    ("name", "architecture", "changes"),
    [
        ("qwen3 moe", "qwen3moe", {}),
        # What llama.cpp's Qwen3-MoE cannot do, its GLM-4-MoE does with a softmax.
        ("qwen3 moe, one expert a token", "glm4moe", {"used_count": 1, "weights_norm": False}),
        ("qwen3 moe, first layer dense", "glm4moe", {"leading_dense_block_count": 1}),
        (
            "glm4 moe",
            "glm4moe",
            {"gating_func": SIGMOID, "weights_scale": 1.5, "leading_dense_block_count": 1},
        ),
        (
            "glm4 moe, groups",
            "glm4moe",
            {"gating_func": SIGMOID, "count": 8, "shared_count": 2, "group_count": 4, "group_used_count": 2},
        ),
    ],
)
def test_the_experts_are_in_the_header(name: str, architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    write_gguf(tiny_model(tmp_path, **ARCHITECTURES[name]), tmp_path / "x.gguf", "f16")
    found = fields(tmp_path / "x.gguf")
    expected: dict[str, Any] = {
        "count": 4,
        "used_count": 2,
        "feed_forward_length": 32,
        "shared_count": 1,
        "gating_func": SOFTMAX,
        "weights_norm": True,
        "weights_scale": 1.0,
        "group_count": None,
        "group_used_count": None,
        "leading_dense_block_count": 0,
    } | changes
    assert found["general.architecture"] == architecture
    dense = found[f"{architecture}.leading_dense_block_count"]
    header = {key: found.get(f"{architecture}.expert_{key}") for key in expected} | {"leading_dense_block_count": dense}
    assert header == expected
    stored = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert stored["blk.1.ffn_gate_inp.weight"] == gguf.GGMLQuantizationType.F32  # llama.cpp demands it of routers
    assert stored["blk.1.ffn_gate_exps.weight"] == gguf.GGMLQuantizationType.F16


def test_what_a_qwen3_moe_lacks_of_a_glm4_moe_is_written_as_nothing(tmp_path: Path) -> None:
    """In its sparse layers alone: a selection bias or a shared expert that is not zero would be another model."""
    write_gguf(tiny_model(tmp_path, **ARCHITECTURES["qwen3 moe, first layer dense"]), tmp_path / "x.gguf", "f32")
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    added = {name: data for name, data in stored.items() if "shexp" in name or "exp_probs_b" in name}
    assert {name: data.shape for name, data in added.items()} == {
        "blk.1.exp_probs_b.bias": (4,),
        "blk.1.ffn_gate_shexp.weight": (32, 64),
        "blk.1.ffn_up_shexp.weight": (32, 64),
        "blk.1.ffn_down_shexp.weight": (64, 32),
    }
    assert not any(data.any() for data in added.values())
    assert stored["blk.0.ffn_gate.weight"].shape == (96, 64)  # the dense layer's own


def test_a_tokenizer_that_ends_every_text_with_a_token_says_so(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    end = "<|im_end|>"
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}]
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {end: {"id": end, "ids": [small_tokenizer().im_end_id], "tokens": [end]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    write_gguf(folder, tmp_path / "x.gguf", "f16")
    found = fields(tmp_path / "x.gguf")
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_eos_token"] is True


def test_a_base_model_s_tokenizer_has_no_end_of_turn(tmp_path: Path) -> None:
    """Nor need it have chat tokens; begin and filler are config.json's, the id 0 too."""
    plain = tokenizers.Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = GPT2, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<filler>", "<|endoftext|>", "<begin>"]
    plain.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    folder = tiny_model(tmp_path, tokenizer=Tokenizer(plain))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config | ids), encoding="utf-8")
    write_gguf(folder, tmp_path / "x.gguf", "f16")
    found = fields(tmp_path / "x.gguf")
    ends = [found.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")]
    assert ends == [2, 1, None, 0]
    assert "tokenizer.chat_template" not in found


def test_where_a_text_begins_and_ends_follows_the_files(tmp_path: Path) -> None:
    """A tokenizer that begins every text with a token, and a config.json with several ends."""
    folder = tiny_model(tmp_path)
    begin = "<|endoftext|>"
    sequence = [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [small_tokenizer().end_of_text_id], "tokens": [begin]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 5]}), encoding="utf-8")
    write_gguf(folder, tmp_path / "x.gguf", "f16")
    found = fields(tmp_path / "x.gguf")
    assert found["tokenizer.ggml.eos_token_id"] == 7
    assert found["tokenizer.ggml.bos_token_id"] == small_tokenizer().end_of_text_id
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False


def test_a_begin_that_only_tokenizer_config_adds_is_added_by_llama_cpp_too(tmp_path: Path) -> None:
    """minnow begins texts with it; the file said that nothing is added, and named config.json's token."""
    folder = tiny_model(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"add_bos_token": True, "bos_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_gguf(folder, tmp_path / "x.gguf", "f16")
    found = fields(tmp_path / "x.gguf")
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.bos_token_id"] == Tokenizer.from_pretrained(folder).start_id
    assert found["tokenizer.ggml.bos_token_id"] == small_tokenizer().im_start_id


def test_a_model_has_the_name_by_which_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run, of a folder wherever one stands, and of the Hub: there it was the hash of a commit."""
    assert model_name(tmp_path / "runs" / "fish" / "model") == "fish"
    assert model_name(tmp_path / "pond") == "pond"
    assert model_name(tmp_path / "models--somebody--small-fish" / "snapshots" / "0123abcd") == "small-fish"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert model_name(Path()) == "here"


def test_template_asks_for_reasoning_only_of_a_model_that_was_taught_to(tmp_path: Path) -> None:
    """llama.cpp sets `enable_thinking` by default, and a model without the habit would answer into the block."""
    import jinja2

    folder = tiny_model(tmp_path)
    texts = []
    for thinking in (False, True):
        write_gguf(folder, tmp_path / "x.gguf", "f16", thinking=thinking)
        template = fields(tmp_path / "x.gguf")["tokenizer.chat_template"]
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        question = {"messages": [{"role": "user", "content": "?"}], "add_generation_prompt": True}
        texts.append(environment.from_string(template).render(**question, enable_thinking=True))
    assert template == chat_template()
    assert texts[0].endswith("<think>\n\n</think>\n\n")
    assert texts[1].endswith("<think>\n")


def test_the_command_s_thinking_reaches_the_file(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    assert cli.main(["export", str(folder), "--to", "gguf", "--thinking", "true"]) == 0
    stored = fields(folder / "model-f16.gguf")["tokenizer.chat_template"]
    assert stored == chat_template()


def test_every_type_has_its_error_and_its_size(tmp_path: Path) -> None:
    """Root mean square error against the bound of the format: half a step of a uniform grid is step / sqrt(12)."""
    folder = tiny_model(tmp_path)
    weight = load_file(folder / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"].numpy()
    # uniform in [-1/4, 1/4]: a block's scale is about 1/4 / 127, or 1/4 / 8 and 1/2 / 15 (4 bits), half that (5 bits)
    steps = {"q8_0": 1 / 508, "q5_1": 1 / 62, "q5_0": 1 / 64, "q4_1": 1 / 30, "q4_0": 1 / 32}
    sizes = {}
    for kind in GGUF_TYPES:
        written = write_gguf(folder, tmp_path / f"{kind}.gguf", kind)
        sizes[kind] = written.bytes
        assert written.kept_f16 == (), "only what a quantised file leaves as it was is told"
        stored = {t.name: t for t in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}
        assert stored["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
        named = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"  # what llama.cpp and the Hub show
        assert fields(tmp_path / f"{kind}.gguf")["general.file_type"] == gguf.LlamaFileType[named]
        if kind in steps:
            assert stored["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
        tensor = stored["blk.0.ffn_gate.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType[kind.upper()]
        error = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape) - weight
        relative = np.sqrt(np.mean(error**2)) / 12**-0.5
        bound = {"f32": 0.0, "f16": 2**-13, "bf16": 2**-10}.get(kind) or steps.get(kind, 0.0)
        assert relative <= 1.1 * bound, kind
        if kind in steps:
            assert relative > 0.7 * bound, kind
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)


def test_a_head_of_its_own_stays_at_8_bits_like_the_embedding(tmp_path: Path) -> None:
    write_gguf(tiny_model(tmp_path, tie_word_embeddings=False), tmp_path / "x.gguf", "q4_0")
    stored = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    kinds = [stored[f"{name}.weight"].name for name in ("token_embd", "output", "blk.0.attn_q")]
    assert kinds == ["Q8_0", "Q8_0", "Q4_0"]


def test_q8_0_by_hand() -> None:
    """One block: scale d = max|x| / 127 in f16, q = round(x / d), each int8."""
    x = torch.linspace(-1.0, 0.5, 32)[None]
    data = encode("x", x, gguf.GGMLQuantizationType.Q8_0)
    scale = data[0, :2].view(np.float16)[0]
    assert scale == np.float16(1 / 127)
    np.testing.assert_array_equal(data[0, 2:].view(np.int8), np.round(x[0].numpy() * 127).astype(np.int8))


def test_narrow_matrices_stay_f16_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model(tmp_path, intermediate_size=40)  # down_proj has rows of 40
    assert cli.main(["export", str(folder), "--to", "gguf", "--type", "q4_0"]) == 0
    assert "2 matrices stay f16" in capsys.readouterr().out
    stored = {t.name: t for t in gguf.GGUFReader(folder / "model-q4_0.gguf").tensors}
    assert stored["blk.1.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert stored["blk.1.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0


def test_a_weight_beyond_f16_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 3] = 70_000.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"blk\.1\.attn_k\.weight has a weight beyond 65504.*--type bf16"):
        write_gguf(folder, tmp_path / "x.gguf", "f16")
    assert not list(tmp_path.glob("*.gguf*"))
    write_gguf(folder, tmp_path / "x.gguf", "bf16")


def test_rope_scalings(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, **ARCHITECTURES["qwen3 yarn"])
    write_gguf(folder, tmp_path / "x.gguf", "f32")
    found = fields(tmp_path / "x.gguf")
    assert found["qwen3.rope.scaling.type"] == "yarn"
    assert found["qwen3.rope.scaling.original_context_length"] == 16
    # llama.cpp multiplies by 0.1 ln 4 + 1 = 1.1386 by itself: 1.1 / 1.1386
    assert found["qwen3.rope.scaling.attn_factor"] == pytest.approx(0.96608, abs=1e-5)

    write_gguf(tiny_model(tmp_path, **ARCHITECTURES["qwen3 linear"]), tmp_path / "x.gguf", "f32")
    found = fields(tmp_path / "x.gguf")
    assert (found["qwen3.rope.scaling.type"], found["qwen3.rope.scaling.factor"]) == ("linear", 2.0)

    # Llama 3's stands in a tensor: by how much the angles of each pair are divided. The first pair turns 16 / (2 pi) =
    # 2.546 times within the trained length, (2.546 - 1) / (4 - 1) = 0.5155 of the way from slow to fast; the last
    # ones not once.
    write_gguf(tiny_model(tmp_path, **ARCHITECTURES["llama grouped, llama3 rope"]), tmp_path / "x.gguf", "f32")
    (factors,) = (t.data for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors if t.name == "rope_freqs.weight")
    assert factors[0] == pytest.approx(1 / ((1 - 0.5155) / 4 + 0.5155), rel=1e-4)
    assert factors[-1] == pytest.approx(4.0)

    for other in ({"beta_fast": 16.0}, {"beta_slow": 2.0}):
        scaling = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=16, **other)
        with pytest.raises(UserError, match="beta_fast and beta_slow as 32 and 1"):
            write_gguf(tiny_model(tmp_path, rope_scaling=scaling), tmp_path / "x.gguf")
    scaling = RopeScaling(type="llama3", factor=4.0, original_max_position_embeddings=16)
    with pytest.raises(UserError, match="for Llama models only"):
        write_gguf(tiny_model(tmp_path, rope_scaling=scaling), tmp_path / "x.gguf")


@pytest.mark.parametrize("more", [{}, ARCHITECTURES["qwen3 moe"]], ids=["dense", "experts"])
def test_what_llama_cpp_has_no_place_for_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, attention_bias=True, attention_output_bias=True, **more)
    with pytest.raises(UserError, match="no bias on o_proj"):
        write_gguf(folder, tmp_path / "x.gguf")


def test_an_adapter_is_written_merged(tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    model = load_pretrained(base)
    add_lora(model, LoraConfig(rank=4), base=str(base))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_pretrained(model, tmp_path / "adapter", small_tokenizer())
    write_gguf(tmp_path / "adapter", tmp_path / "x.gguf", "f32")
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    merged = load_pretrained(tmp_path / "adapter").state_dict()["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(stored["blk.1.attn_q.weight"], merged.numpy())
    assert not torch.equal(merged, load_pretrained(base).state_dict()["model.layers.1.self_attn.q_proj.weight"])


def byte_level(*parts: Any, ignore_merges: bool = False) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    tokenizer.decoder = decoders.ByteLevel()
    return json.loads(tokenizer.to_str())


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


@pytest.mark.parametrize(
    ("definition", "name"),
    [
        (byte_level(split(QWEN2_PATTERN), BYTES), "qwen2"),
        (byte_level(GPT2), "gpt-2"),
        (byte_level(pre_tokenizers.Digits(individual_digits=True), GPT2), "smollm"),
        (byte_level(split(LLAMA3_PATTERN), BYTES, ignore_merges=True), "llama-bpe"),
    ],
)
def test_the_type_follows_the_tokenizer(definition: dict[str, Any], name: str) -> None:
    assert pre_tokenizer(definition).name == name


@pytest.mark.parametrize(
    "definition",
    [
        byte_level(split(QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,2}|")), BYTES),
        byte_level(split(QWEN2_PATTERN), BYTES, ignore_merges=True),
        byte_level(split(LLAMA3_PATTERN), BYTES),
        byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)),
        byte_level(pre_tokenizers.Digits(individual_digits=False), GPT2),
        byte_level(pre_tokenizers.Split(Regex(QWEN2_PATTERN), "removed"), BYTES),
        byte_level(pre_tokenizers.Whitespace(), BYTES),
        byte_level(split(GPT2_PATTERN), split(QWEN2_PATTERN), BYTES),
    ],
)
def test_an_unknown_split_is_refused(definition: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="llama.cpp would split texts unlike this tokenizer"):
        pre_tokenizer(definition)


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(UserError, match="Unigram: only byte-level BPE"):
        pre_tokenizer(json.loads(tokenizers.Tokenizer(models.Unigram()).to_str()))
    with pytest.raises(UserError, match="BPE on characters"):
        pre_tokenizer(json.loads(tokenizers.Tokenizer(models.BPE(byte_fallback=True)).to_str()))
    lowercase = byte_level(GPT2) | {"normalizer": {"type": "Lowercase"}}
    with pytest.raises(UserError, match="normalises text"):
        pre_tokenizer(lowercase)
    composing = pre_tokenizer(byte_level(GPT2) | {"normalizer": {"type": "NFC"}})
    assert composing.name == "gpt-2"
    assert "NFC" in (composing.note or "")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, vocab_size=small_tokenizer().vocab_size - 1)
    with pytest.raises(UserError, match="do not belong together"):
        write_gguf(folder, tmp_path / "x.gguf")


def test_a_model_that_may_only_be_read_is_exported_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that an administrator has put there: its card could not be renewed, and nothing was written."""

    def refused(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("minnow.report.model_card.atomic_write", refused)
    folder = tiny_model(tmp_path)
    assert cli.main(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "x.gguf")]) == 0
    assert (tmp_path / "x.gguf").is_file()
    assert "may only be read: its card stays as it is" in capsys.readouterr().out


def test_wrong_requests_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny_model(tmp_path))
    for words, message in [
        (["--to", "gguf", "--type", "int8"], "--type int8 is no GGUF type"),
        (
            ["--to", "gguf", "--out", folder],
            f"--out {folder} is a folder: name the file, such as {folder}/model-f16.gguf",
        ),
        (["--to", "onnx", "--out", folder], f"--out {folder} is a folder: name the file, such as {folder}/model.onnx"),
        (["--to", "onnx", "--type", "q8_0"], "--type q8_0 is no ONNX type"),
        (["--to", "onnx", "--thinking", "true"], "--thinking is for --to gguf and ollama: with onnx it would change"),
        (["--to", "gguf", "--private", "true"], "--private is for --to hub: with gguf it would change nothing"),
        (["somebody/something", "--to", "hub", "--out", "x"], "--out is for --to gguf and ollama and onnx"),
        (["--to", "hub"], "OWNER/NAME"),
        (["somebody/something", "--to", "gguf"], "OWNER/NAME"),
        (["--to", "gguf", "--out", "."], "--out . is a folder: name the file, such as model-f16.gguf"),
    ]:
        assert cli.main(["export", folder, *words]) == 2
        assert message in capsys.readouterr().err


def test_mixed_text_has_every_kind_of_character() -> None:
    """MIXED is what test_llama_cpp.py compares ids on: it must keep its letters, digits, marks and line ends."""
    assert small_tokenizer().decode(small_tokenizer().encode(MIXED)) == MIXED


@pytest.mark.parametrize("type", ["f32", "f16"])
def test_eyes_have_a_file_of_their_own(tmp_path: Path, type: GgufType) -> None:
    """Names and values as `llama.cpp` reads them; test_llama_cpp.py runs them."""
    folder = seeing_model(tmp_path)
    written = write_gguf(folder, tmp_path / "m.gguf", type)
    assert written.mmproj == tmp_path / "mmproj-m.gguf"
    model = load_pretrained(folder)
    assert isinstance(model, VisionLanguageModel)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written.mmproj).tensors}
    layer = model.vision_tower.vision_model.encoder.layers[1]
    for name, expected in {
        "v.patch_embd.weight": model.vision_tower.vision_model.embeddings.patch_embedding.weight,
        "v.position_embd.weight": model.vision_tower.vision_model.embeddings.position_embedding.weight,
        "v.blk.1.ffn_up.weight": layer.mlp.fc1.weight,
        "v.blk.1.attn_out.bias": layer.self_attn.out_proj.bias,
        "mm.0.weight": model.multi_modal_projector.linear_1.weight,
        "mm.2.bias": model.multi_modal_projector.linear_2.bias,
    }.items():
        stored = tensors[name].data
        half = type == "f16" and name in ("v.patch_embd.weight", "v.blk.1.ffn_up.weight", "mm.0.weight")
        assert stored.dtype == (np.float16 if half else np.float32), name
        np.testing.assert_allclose(stored, expected.detach().numpy(), atol=1e-3 if half else 0)
    assert not any("post_ln" in name for name in tensors)  # llama.cpp would run it, and transformers does not
    said = fields(written.mmproj)
    assert [said[key] for key in ("clip.vision.block_count", "clip.projector_type", "clip.use_gelu")] == [
        3,
        "mlp",
        True,
    ]
    assert said["clip.vision.image_size"] == 32
    assert not any(tensor.name.startswith(("v.", "mm.")) for tensor in gguf.GGUFReader(written.path).tensors)


def test_a_tower_that_llama_cpp_would_read_wrongly_is_refused(tmp_path: Path) -> None:
    folder = seeing_model(tmp_path, tower={"intermediate_size": 64})  # as wide as the tower
    with pytest.raises(UserError, match="swapped"):
        write_gguf(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))  # nor the language model alone
