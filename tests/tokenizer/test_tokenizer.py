"""Ids and back: every text round-trips, the fast path is exact, files load again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_helpers import CORPUS, real_texts, small_tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minnow.config import UserError
from minnow.model.pretrained import resolve_model_folder
from minnow.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer


def slow_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """What the `tokenizers` library says, without the fast path."""
    return [e.ids for e in tokenizer._ordinary.encode_batch_fast(list(texts), add_special_tokens=False)]


any_text = st.text() | st.text(alphabet=" \t\n\r'sdlmrtv1a鱼.!<|>\u3000\x85é\u0301🐟", max_size=40)


@settings(max_examples=400, deadline=None)
@given(text=any_text)
def test_every_text_comes_back(text: str) -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.encode_batch([text, text]) == [ids, ids] == slow_ids(tokenizer, [text, text])


@settings(max_examples=100, deadline=None)
@given(string=st.binary())
def test_every_byte_string_comes_back(string: bytes) -> None:
    """A document of any bytes, read as Latin-1, and all bytes that a token can be."""
    text = string.decode("latin-1")
    assert small_tokenizer().decode(small_tokenizer().encode(text)).encode("latin-1") == string


def test_every_byte_is_a_token() -> None:
    singles = {bytes([byte]) for byte in range(256)}
    assert singles <= set(small_tokenizer().byte_strings)
    assert small_tokenizer().encode("") == []


def test_special_tokens_have_the_low_ids() -> None:
    tokenizer = small_tokenizer()
    assert {token: i for i, token in enumerate(SPECIAL_TOKENS)} == tokenizer.special_ids
    fixed = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <think> </think>"
    fixed += " <tool_call> </tool_call> <tool_response> </tool_response> <|reserved_0|>"
    assert SPECIAL_TOKENS[:13] == tuple(fixed.split()), "models keep their ids for life"
    assert (tokenizer.end_of_text_id, tokenizer.pad_id, tokenizer.im_start_id, tokenizer.im_end_id) == (0, 0, 1, 2)
    assert tokenizer.vocab_size == 500
    assert tokenizer.token_bytes().dtype == np.int32
    assert tokenizer.token_bytes().shape == (500,)
    assert (tokenizer.token_bytes()[: len(SPECIAL_TOKENS)] == 0).all()
    assert (tokenizer.token_bytes()[len(SPECIAL_TOKENS) :] > 0).all()


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_the_text_of_a_control_token_is_text(token: str) -> None:
    ids = small_tokenizer().encode(f"a {token}b")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert small_tokenizer().decode(ids) == f"a {token}b"


def test_half_a_surrogate_pair_becomes_the_replacement_character() -> None:
    text = json.loads('"fish \\ud83d."')
    for tokenizer in (small_tokenizer(), normalised()):
        assert tokenizer.decode(tokenizer.encode(text)) == "fish \ufffd."
        assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def test_training_is_deterministic_in_any_order() -> None:
    again = train_tokenizer(reversed(CORPUS), 500)
    assert again.fingerprint == small_tokenizer().fingerprint
    assert train_tokenizer(CORPUS, 499).fingerprint != again.fingerprint


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="need 288"):
        train_tokenizer(CORPUS, 287)
    assert train_tokenizer(CORPUS, 288).vocab_size == 288


def test_files_load_again(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path / "run" / "model")
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        again = Tokenizer.from_pretrained(folder)
        assert again.fingerprint == small_tokenizer().fingerprint
        assert again.encode(CORPUS[0]) == small_tokenizer().encode(CORPUS[0])
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    config = json.loads((tmp_path / "run" / "model" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json here"):
        Tokenizer.from_pretrained(tmp_path)


def gpt2(folder: Path) -> Path:
    """GPT-2's shape: ByteLevel with its own regex, `<|endoftext|>` the last id, vocab.json and merges.txt too."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    tokenizer.model.save(str(folder))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def normalised() -> Tokenizer:
    """An existing tokenizer with a normaliser (as Qwen's): the fast path does not apply."""
    tokenizer = tokenizers.Tokenizer.from_str(small_tokenizer()._tokenizer.to_str())
    tokenizer.normalizer = normalizers.NFC()
    return Tokenizer(tokenizer)


@settings(max_examples=100, deadline=None)
@given(text=any_text)
def test_an_existing_tokenizer_works(gpt2_tokenizer: Tokenizer, text: str) -> None:
    assert gpt2_tokenizer.decode(gpt2_tokenizer.encode(text)) == text
    assert gpt2_tokenizer.encode(text) == slow_ids(gpt2_tokenizer, [text])[0]
    assert gpt2_tokenizer.token_bytes()[gpt2_tokenizer.encode(text)].sum() == len(text.encode())


@pytest.fixture(scope="module")
def gpt2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(gpt2(tmp_path_factory.mktemp("gpt2")))


def test_gpt2_without_chat_tokens(gpt2_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert gpt2_tokenizer._core is not None  # the fast path takes it
    assert gpt2_tokenizer.end_of_text_id == gpt2_tokenizer.vocab_size - 1
    assert gpt2_tokenizer.end_of_text_id not in gpt2_tokenizer.encode("a<|endoftext|>b")
    assert not gpt2_tokenizer.has_chat_tokens
    gpt2_tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == gpt2_tokenizer.fingerprint
    with pytest.raises(UserError, match=r"lack <\|im_start\|>, <\|im_end\|>, <think>, </think>"):
        _ = gpt2_tokenizer.im_start_id


def test_gpt2_as_vocab_and_merges(gpt2_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (gpt2(tmp_path) / "tokenizer.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).encode(CORPUS[0]) == gpt2_tokenizer.encode(CORPUS[0])


def test_a_repository_without_tokenizer_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for GPT-2's pair of files, which were not asked for, it ended in an error of the library below."""
    repository, copy = tmp_path / "repository", tmp_path / "copy"
    repository.mkdir()
    copy.mkdir()

    def download(name: str, allow_patterns: list[str]) -> str:
        for file in repository.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, copy)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (repository / "tokenizer.model").touch()  # SentencePiece's
    with pytest.raises(UserError, match=r"somebody/fish: the Hub has it, but without a tokenizer\.json"):
        Tokenizer.from_pretrained("somebody/fish")
    (gpt2(repository) / "tokenizer.json").unlink()
    assert Tokenizer.from_pretrained("somebody/fish").decode([0]) == "!"


def test_a_hub_that_says_nothing_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time-out may have no words: the search for their first line ended in an IndexError."""

    def download(name: str, allow_patterns: list[str]) -> str:
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=r"nor a model on the Hugging Face Hub \(TimeoutError\)"):
        Tokenizer.from_pretrained("somebody/fish")
    with pytest.raises(UserError, match=r"the Hugging Face Hub could not give it \(TimeoutError\)"):
        resolve_model_folder("somebody/fish")


def test_what_begins_and_what_fills_is_read_from_the_files(tmp_path: Path) -> None:
    """The newer file goes before the older one, and a BOS that is named is put before a text only if one says so."""
    small_tokenizer().save_pretrained(tmp_path)
    begin, fill = "<|reserved_0|>", "<|reserved_1|>"
    ids = small_tokenizer().special_ids
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": begin}, "pad_token": begin}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "pad_token": fill}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (ids[begin], ids[fill])
    assert tokenizer.start_id == tokenizer.end_of_text_id
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    assert Tokenizer.from_pretrained(tmp_path).start_id == ids[begin]


def test_a_token_that_is_put_before_every_text_begins_it_whatever_is_named(tmp_path: Path) -> None:
    begin = "<|reserved_0|>"
    first = small_tokenizer().special_ids[begin]
    plain = tokenizers.Tokenizer.from_str(small_tokenizer()._tokenizer.to_str())
    plain.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, first)])
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|reserved_1|>"}))
    assert Tokenizer.from_pretrained(tmp_path).start_id == first


def test_another_name_for_the_end_of_text(tmp_path: Path) -> None:
    text = small_tokenizer()._tokenizer.to_str().replace("<|endoftext|>", "</s>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="eos_token"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert Tokenizer.from_pretrained(tmp_path).roles.end_of_text == "</s>"


def test_the_fast_path_refuses_what_it_cannot_prove() -> None:
    assert small_tokenizer()._core is not None
    assert normalised()._core is None
    assert normalised().encode_batch(["é <|im_end|>"])[0] == normalised().encode("e\u0301 <|im_end|>")
    assert normalised().im_end_id not in normalised().encode("<|im_end|>")

    def with_merges(merges: list[tuple[str, str]], vocabulary: list[str]) -> Tokenizer:
        definition = json.loads(train_tokenizer([], 288)._tokenizer.to_str())
        definition["model"]["vocab"] |= {token: 288 + i for i, token in enumerate(vocabulary)}
        definition["model"]["merges"] = merges
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(definition)))

    fine = with_merges([("b", "c"), ("a", "bc")], ["bc", "abc"])
    assert fine._core is not None
    assert fine.encode("abc") == slow_ids(fine, ["abc"])[0] == [289]
    # tiktoken would merge the neighbours ab+c, which is no learnt pair: "abc" encodes as ab, c
    unreachable = with_merges([("a", "b"), ("b", "c"), ("a", "bc")], ["ab", "bc", "abc"])
    assert unreachable._core is None
    assert len(unreachable.encode("abc")) == 2


def test_long_runs_of_anything_encode() -> None:
    for text in (" " * 200_000, "a" * 200_000, "鱼" * 50_000, "\n" * 200_000, "!" * 200_000, " a" * 50_000):
        assert small_tokenizer().decode(small_tokenizer().encode(text)) == text


@pytest.mark.parametrize("character", [" ", "\n"])
def test_white_space_beyond_tiktokens_stack(character: str) -> None:
    text = "fish" + character * 1_000_000 + "fish"
    ids = small_tokenizer().encode(text)
    assert small_tokenizer().decode(ids) == text
    assert small_tokenizer().encode_batch(["fish", text]) == [small_tokenizer().encode("fish"), ids]


def test_fast_ids_are_the_slow_ids_on_real_text() -> None:
    texts = real_texts("zh_howtocook", "en_childrens_stories", "en_tinyshakespeare", limit=600)
    tokenizer = train_tokenizer(texts[:300], 3000)
    ids = tokenizer.encode_batch(texts)
    assert ids == slow_ids(tokenizer, texts)
    assert all(tokenizer.decode(i) == text for i, text in zip(ids, texts, strict=True))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{tmp_path}/{name}: not .*; restore the file"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [{}, {"base_model_name_or_path": None}])
def test_an_adapter_that_does_not_name_its_model(tmp_path: Path, config: dict[str, Any]) -> None:
    """PEFT allows null; it was a TypeError, and a KeyError without the key."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="adapter_config.json does not name its model"):
        Tokenizer.from_pretrained(tmp_path)
