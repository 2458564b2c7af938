"""Other people's models: a text begins with their BOS, an answer ends at their ends, and saving keeps both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tests.engine.engine_helpers import tiny_model
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minnow.config import UserError
from minnow.data.prepare import DataConfig, prepare
from minnow.engine import Engine, SamplingParams
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.tokenizer import Tokenizer

TEXTS = ["a pond full of minnows", "the heron waits, the minnow does not"]


def foreign(
    folder: Path, *, special: list[str], bos: str | None, config: dict[str, Any], generation: dict[str, Any]
) -> Path:
    """A random Llama with a tokenizer in other people's manner; `bos` stands before every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
    save_pretrained(tiny_model(vocab_size=tokenizer.get_vocab_size(), qk_norm=False), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, **config})
    )
    content = json.loads((folder / "config.json").read_text())
    ids = {key: value for key, value in generation.items() if key.endswith("token_id")}
    (folder / "config.json").write_text(json.dumps(content | ids))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def llama_2(folder: Path) -> Path:
    return foreign(
        folder,
        special=["<unk>", "<s>", "</s>"],
        bos="<s>",
        config={"eos_token": "</s>", "add_bos_token": True},
        generation={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.6, "do_sample": True},
    )


def llama_3(folder: Path) -> Path:
    """As from 3.1 on: only the model's files say that it may also end in <|eom_id|>, the tokenizer's do not."""
    return foreign(
        folder,
        special=["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eom_id|>", "<|eot_id|>"],
        bos="<|begin_of_text|>",
        config={"eos_token": "<|eot_id|>", "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"},
        generation={"bos_token_id": 0, "eos_token_id": [1, 3, 4], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
    )


def qwen_2(folder: Path) -> Path:
    """Its chat tokens are ours but for the thoughts and the tools' answers."""
    return foreign(
        folder,
        special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        bos=None,
        config={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        generation={"eos_token_id": [2, 0], "pad_token_id": 0, "repetition_penalty": 1.05},
    )


@pytest.mark.parametrize("make", [llama_2, llama_3, qwen_2])
def test_greedy_is_theirs_from_the_first_token(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    engine = Engine(load_pretrained(folder), Tokenizer.from_pretrained(folder))
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt").input_ids
        if make is qwen_2:  # it puts nothing before a text; we put what separates documents
            inputs = torch.cat([torch.tensor([[0]]), inputs], dim=1)
        assert engine.prompt_ids(text) == inputs[0].tolist()
        expected = theirs.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, repetition_penalty=1.0, max_new_tokens=20
        )
        (answer,) = engine.generate([text], SamplingParams(max_tokens=20, temperature=0))[0].completions
        assert answer.ids == expected[0, inputs.shape[1] :].tolist()


@pytest.mark.parametrize(("make", "ends"), [(llama_2, {2}), (llama_3, {1, 3, 4}), (qwen_2, {0, 2})])
def test_an_answer_ends_where_the_model_s_files_say(
    make: Callable[[Path], Path], ends: set[int], tmp_path: Path
) -> None:
    folder = make(tmp_path / "model")
    engine = Engine(load_pretrained(folder), Tokenizer.from_pretrained(folder))
    for end in range(5):
        params = SamplingParams(max_tokens=3, temperature=0, logit_bias={end: 1e4})
        (answer,) = engine.generate([TEXTS[0]], params)[0].completions
        assert (answer.finish_reason == "stop") == (end in ends)


@pytest.mark.parametrize("make", [llama_2, llama_3, qwen_2])
def test_loaded_and_saved_it_begins_and_ends_as_before(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    save_pretrained(load_pretrained(folder), tmp_path / "again", Tokenizer.from_pretrained(folder))
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    before = json.loads((folder / "generation_config.json").read_text())
    ids = before.pop("eos_token_id")
    assert set(again["eos_token_id"]) == set(ids if isinstance(ids, list) else [ids])
    assert before.items() <= again.items()
    old, new = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "again"))
    assert new(TEXTS).input_ids == old(TEXTS).input_ids
    assert new.eos_token == old.eos_token
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["eos_token_id"] == old.eos_token_id
    if old.bos_token is not None:
        assert (new.bos_token, config["bos_token_id"]) == (old.bos_token, old.bos_token_id)
    if old.chat_template is not None:
        conversation = [{"role": "user", "content": "hello"}]
        rendered = [tokenizer.apply_chat_template(conversation, tokenize=False) for tokenizer in (old, new)]
        assert rendered[0] == rendered[1]
    assert Tokenizer.from_pretrained(tmp_path / "again").fingerprint == Tokenizer.from_pretrained(folder).fingerprint


@pytest.mark.parametrize(("make", "begin", "end"), [(llama_2, 1, 2), (llama_3, 0, 1), (qwen_2, 0, 0)])
def test_a_document_begins_with_bos(make: Callable[[Path], Path], begin: int, end: int, tmp_path: Path) -> None:
    """And ends with the end of a text, not of a turn."""
    tokenizer = Tokenizer.from_pretrained(make(tmp_path / "model"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = DataConfig(
        paths=(str(tmp_path / "rows.jsonl"),), validation_fraction=0.0, cache_dir=str(tmp_path / "cache")
    )
    shards = prepare(config, tokenizer, "pretrain", sequence_length=32).train
    documents = [shards.tokens(number) for number in range(2)]
    expected = [np.array([begin, *tokenizer.encode(text), end]) for text in TEXTS]
    assert sorted(document.tolist() for document in documents) == sorted(e.tolist() for e in expected)


def test_another_class_s_vocabulary_and_merges_are_refused(tmp_path: Path) -> None:
    """Read as GPT-2's they would split otherwise and lose the control tokens."""
    folder = qwen_2(tmp_path / "model")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(UserError, match="of a Qwen2Tokenizer.*write tokenizer.json"):
        Tokenizer.from_pretrained(folder)
