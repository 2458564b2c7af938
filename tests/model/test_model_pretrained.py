"""Model folders: whole or not at all, strict on what they hold."""

from __future__ import annotations

import dataclasses
import json
import shutil

import huggingface_hub
import pytest
import torch
from model_helpers import FakeTokenizer, row_logits, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from minnow.config import UserError
from minnow.model.pretrained import load_pretrained, resolve_model_folder, save_pretrained
from minnow.tokenizer.train import train_tokenizer


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "model", FakeTokenizer())
    return tmp_path / "model"


def change_config(folder, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_written(folder):
    content = json.loads((folder / "config.json").read_text())
    assert content["architectures"] == ["Qwen3ForCausalLM"]
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 10_000.0
    assert content["dtype"] == content["torch_dtype"] == "float32"
    assert (content["bos_token_id"], content["eos_token_id"], content["pad_token_id"]) == (0, 2, 0)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0}
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # tied
    assert (folder / "tokenizer.json").is_file()


def test_transformers_reads_model_and_tokenizer_from_one_folder(tmp_path):
    tokenizer = train_tokenizer(["the heron eats the frog", "苍鹭吃青蛙"] * 4, vocab_size=320)
    save_pretrained(tiny_model(vocab_size=tokenizer.vocab_size), tmp_path / "model", tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert their_tokenizer("the frog 青蛙")["input_ids"] == tokenizer.encode("the frog 青蛙")
    assert their_tokenizer.pad_token_id == theirs.generation_config.pad_token_id == tokenizer.end_of_text_id
    assert theirs.generation_config.eos_token_id == [tokenizer.im_end_id, tokenizer.end_of_text_id]


def test_dtypes(folder, tmp_path):
    model = load_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())
    assert model.compute_dtype == torch.bfloat16
    save_pretrained(load_pretrained(folder), tmp_path / "half", dtype=torch.bfloat16)
    stored = load_pretrained(tmp_path / "half")
    assert stored.head_weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_saving_replaces_the_older_folder_whole(folder):
    (folder / "stale.txt").write_text("from an older run")
    save_pretrained(tiny_model(seed=1), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_pretrained(folder).head_weight, tiny_model(seed=1).head_weight)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_older_folder(folder):
    class Broken(FakeTokenizer):
        def save_pretrained(self, folder) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tiny_model(seed=1), folder, Broken())
    assert torch.equal(load_pretrained(folder).head_weight, tiny_model().head_weight)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_shards_are_read(folder):
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: whole[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load_pretrained(folder).head_weight, whole["model.embed_tokens.weight"])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="names model-00002-of-00002.safetensors, which is not there"):
        load_pretrained(folder)


def test_a_whole_file_goes_before_an_index(folder):
    """As in transformers. The index and its shards are of an older save, whose every weight was zero."""
    whole, shard = load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors"
    save_file({name: tensor * 0 for name, tensor in whole.items()}, folder / shard, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(whole, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(theirs.get_input_embeddings().weight, whole["model.embed_tokens.weight"])
    assert torch.equal(load_pretrained(folder).head_weight, whole["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{}", "no weight_map in it"),
        (b'{"weight_map": null}', "no weight_map in it"),
        (b"[]", "not a JSON object, list"),
        (b"{bad", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_a_broken_index_is_refused_by_name(folder, index, message):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(UserError, match=rf"model/model\.safetensors\.index\.json: {message}"):
        load_pretrained(folder)


def test_a_tied_head_stored_twice_is_read(folder):
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    load_pretrained(folder)
    change_weights(folder, lambda w: w["lm_head.weight"].add_(1.0))
    with pytest.raises(UserError, match=r"unexpected lm_head\.weight"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"missing model\.norm\.weight \(48,\)"),
        (lambda w: w.update({"model.extra.weight": torch.ones(1)}), r"unexpected model\.extra\.weight"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(47)}),
            r"model\.norm\.weight has shape \(47,\) where config\.json asks for \(48,\)",
        ),
        (lambda w: w.clear() or w.update({"x": torch.ones(1)}), r"; and \d+ more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
            "MambaForCausalLM .* is not supported; these are: Qwen3ForCausalLM",
        ),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "a reward model"),
        ({"attention_bias": True}, r"missing model\.layers\.0\.self_attn\.q_proj\.bias"),  # read, so they must be there
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with sliding_attention"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"is_causal": False}, "is_causal = False"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "no hidden_size in it"),
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
    tokens = torch.randint(0, 97, (2, 60))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_pretrained(folder)
    assert (ours.config.rope_scaling.type, ours.config.rope_scaling.factor) == ("yarn", 4.0)
    with torch.no_grad():
        torch.testing.assert_close(row_logits(ours, tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_what_changes_no_number_is_read(folder):
    """Values at which a class computes what ours computes, and attributes that it does not look at."""
    expected = load_pretrained(folder).config
    change_config(
        folder, hidden_act="swish", pretraining_tp=2, attention_dropout=0, partial_rotary_factor=None,
        layer_types=["full_attention"] * 3, sliding_window=4096, max_window_layers=28, initializer_range=0.1,
    )  # fmt: skip
    assert load_pretrained(folder).config == expected


READ = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters attention_bias mlp_bias"""
REFUSED = "hidden_act attention_dropout use_sliding_window layer_types is_causal add_cross_attention pruned_heads"
OF_NO_WEIGHT = """initializer_range use_cache bos_token_id eos_token_id pad_token_id pretraining_tp
    sliding_window max_window_layers"""


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_every_attribute_of_the_classes_is_dealt_with(config_class):
    """One that a later transformers adds is looked at here before anybody's checkpoint is misread."""
    own = {f.name for f in dataclasses.fields(config_class)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    assert own - set(f"{READ} {REFUSED} {OF_NO_WEIGHT}".split()) == set()


def test_a_hub_id_is_a_folder(folder, tmp_path, monkeypatch):
    """As the Hub's client lays a downloaded model out, and without a network."""
    snapshots = tmp_path / "hub" / "models--somebody--small"
    (snapshots / "refs").mkdir(parents=True)
    (snapshots / "refs" / "main").write_text("0123abc")
    shutil.copytree(folder, snapshots / "snapshots" / "0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = resolve_model_folder("somebody/small")
    assert found == snapshots / "snapshots" / "0123abc"
    assert torch.equal(load_pretrained("somebody/small").head_weight, load_pretrained(folder).head_weight)


def test_pickles_and_broken_files_are_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, never read"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_pretrained(folder)


def test_resolving_model(folder, tmp_path):
    assert resolve_model_folder(folder) == folder
    assert resolve_model_folder(tmp_path) == folder  # a run folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a model folder .* nor a run folder"):
        resolve_model_folder(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder"):
        resolve_model_folder(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(UserError, match="minnow/no-such-model: no such folder here, and the Hugging"):
        resolve_model_folder("minnow/no-such-model")
