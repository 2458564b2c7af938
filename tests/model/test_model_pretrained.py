"""Model folders: whole or not at all, strict on what they hold."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
from model_helpers import FakeTokenizer, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minnow.config import UserError
from minnow.model.pretrained import load_pretrained, resolve_model_folder, save_pretrained
from minnow.tokenizer.train import train_tokenizer


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "model", FakeTokenizer())
    return tmp_path / "model"


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


def test_whoever_may_read_the_folder_may_read_the_weights(folder):
    """safetensors makes its files readable to their owner alone: a server of another user could not load the model."""
    mode = (folder / "config.json").stat().st_mode
    assert (folder / "model.safetensors").stat().st_mode == mode


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


def test_a_linked_folder_is_written_to_where_it_lies(folder, tmp_path):
    """On a larger disk, say: the older model there could not be removed, and training ended in an OSError."""
    link = tmp_path / "link"
    link.symlink_to(folder)
    save_pretrained(tiny_model(seed=1), link)
    assert link.is_symlink()
    assert torch.equal(load_pretrained(folder).head_weight, tiny_model(seed=1).head_weight)


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
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": ["x"]}}')
    with pytest.raises(UserError, match=r"names \['x'\], which is not there"):
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
        (b'{"weight_map": {"a": "../other.safetensors"}}', "it names ../other.safetensors, which is no file of this"),
        (b'{"weight_map": {"a": "/other.safetensors"}}', "it names /other.safetensors, which is no file of this"),
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


def test_layers_without_end_are_refused_before_they_are_made(folder):
    """Of ten million of them, the making alone went on until the memory was full."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 1001}))
    with pytest.raises(UserError, match=r"do not fit config.json: they are \d+ tensors, and it asks for 1001 layers"):
        load_pretrained(folder)


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


@pytest.mark.parametrize("name", ["../model", "runs/小鱼", "runs/a--b", "runs/-1", "runs/b."])
def test_a_folder_whose_name_is_no_hub_id_is_told_in_a_line(name):
    """One slash, as a Hub id has one: the Hub's client refused it in an error of its own, with a traceback."""
    with pytest.raises(UserError, match=r"no such folder \(and not a Hugging Face id"):
        resolve_model_folder(name)


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
