"""A byte-level BPE tokenizer as GGUF metadata, with the name of the split that llama.cpp does before the merges.

llama.cpp has no regex engine for arbitrary patterns: it knows a list of splits by name (`tokenizer.ggml.pre`), each
written out in C++. A tokenizer whose split is none of them would be cut differently and give other ids without any
error, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import tokenizers

from minnow.config import UserError
from minnow.json_file import read_json
from minnow.tokenizer.bytelevel import GPT2_PATTERN, QWEN2_PATTERN, components
from minnow.tokenizer.tokenizer import Tokenizer

LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
"""Llama 3's: Qwen2's, with digits in threes."""

_BYTE_LEVEL = ("ByteLevel", "")
_KNOWN: dict[tuple[tuple[tuple[str, str], ...], bool], str] = {
    ((("Split", QWEN2_PATTERN), _BYTE_LEVEL), False): "qwen2",
    ((("Split", LLAMA3_PATTERN), _BYTE_LEVEL), True): "llama-bpe",
    ((("ByteLevel", GPT2_PATTERN),), False): "gpt-2",
    ((("Digits", "one"), ("ByteLevel", GPT2_PATTERN)), False): "smollm",
}
"""(What splits a text, in order; whether a piece that is a token skips the merges) -> llama.cpp's name. Each is
compared with llama.cpp in tests/export/test_llama_cpp.py."""


@dataclass(frozen=True)
class PreTokenizer:
    """How llama.cpp is told to split."""

    name: str
    """Value of `tokenizer.ggml.pre`."""
    note: str | None
    """What llama.cpp does not do and transformers does, for the user to know; None where they are the same."""


def pre_tokenizer(definition: dict[str, Any]) -> PreTokenizer:
    """llama.cpp's type for a parsed tokenizer.json. UserError where there is none that splits the same."""
    model = definition["model"]
    odd = [key for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model["type"] != "BPE" or model.get("byte_fallback") or odd:
        what = model["type"] + (
            f" with {', '.join(odd)}" if odd else " on characters" if model["type"] == "BPE" else ""
        )
        raise UserError(f"the tokenizer is {what}: only byte-level BPE can be written to GGUF")
    parts = tuple(_signature(part) for part in components(definition["pre_tokenizer"], "pretokenizers"))
    name = _KNOWN.get((parts, bool(model.get("ignore_merges"))))
    if name is None:
        shown = ", ".join(f"{kind} {rule}".strip() for kind, rule in parts) or "nothing"
        raise UserError(
            f"llama.cpp would split texts unlike this tokenizer, which uses {shown}; it can be told of "
            f"{', '.join(sorted(_KNOWN.values()))} only. transformers, vLLM and ONNX read the model as it is"
        )
    kinds = [part["type"] for part in components(definition["normalizer"], "normalizers")]
    if kinds not in ([], ["NFC"]):
        raise UserError(f"the tokenizer normalises text ({', '.join(kinds)}), which llama.cpp does not")
    note = "the tokenizer composes characters (NFC) first and llama.cpp does not: give it composed text"
    return PreTokenizer(name, note if kinds else None)


def _signature(part: dict[str, Any]) -> tuple[str, str]:
    """What a part of a pre-tokenizer does, as (type, rule)."""
    kind = str(part["type"])
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return kind, str(part["pattern"].get("Regex", part["pattern"]))
    if kind == "Digits":
        return kind, "one" if part["individual_digits"] else "runs"
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return kind, GPT2_PATTERN if part["use_regex"] else ""
    return kind, json.dumps({key: value for key, value in part.items() if key != "type"}, sort_keys=True)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int, template: str | None) -> str | None:
    """Write the tokenizer of the model in `folder`, and the chat template; returns `PreTokenizer.note`.

    vocab_size: rows of the embedding; rows beyond the tokenizer's ids are marked as unused.
    """
    tokenizer = Tokenizer.from_pretrained(folder)
    definition = tokenizer.definition
    pre = pre_tokenizer(definition)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the embedding {vocab_size} rows: "
            "they do not belong together"
        )
    tokens, types = _tokens(definition, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre.name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = definition["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}  # an adapter has none
    # llama.cpp takes token 11 for what is not written, so begin, end and filler always are.
    end = _first(config.get("eos_token_id"), tokenizer.end_of_text_id)
    begin = _first(config.get("bos_token_id"), tokenizer.end_of_text_id)
    if tokenizer.roles.adds_bos:  # by tokenizer.json or by tokenizer_config.json
        begin = tokenizer.start_id
    ids: list[tuple[Callable[[int], None], int]] = [
        (writer.add_eos_token_id, end),
        (writer.add_bos_token_id, begin),
        (writer.add_pad_token_id, _first(config.get("pad_token_id"), tokenizer.end_of_text_id)),
    ]
    if tokenizer.has_chat_tokens:
        ids.append((writer.add_eot_token_id, tokenizer.im_end_id))
    for add, index in ids:
        add(index)
    writer.add_add_bos_token(tokenizer.roles.adds_bos)
    writer.add_add_eos_token(_adds_at_the_end(definition, end))
    if template is not None:
        writer.add_chat_template(template)
    return pre.note


def _tokens(definition: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id.

    Control tokens that a reader of answers must see (`<think>`, `<tool_call>`) are "user defined": llama.cpp prints
    those. Tokens that are special in tokenizer.json are "control": it hides them.
    """
    tokens = [f"[unused {index}]" for index in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    for token, index in definition["model"]["vocab"].items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    for added in definition["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED)
    return tokens, types


def _first(ids: int | list[int] | None, otherwise: int) -> int:
    """config.json gives one id, several, or none."""
    if isinstance(ids, list):
        ids = ids[0] if ids else None
    return otherwise if ids is None else ids


def _adds_at_the_end(definition: dict[str, Any], index: int) -> bool:
    """Whether the tokenizer puts token `index` behind every text by itself."""
    added = tokenizers.Tokenizer.from_str(json.dumps(definition)).encode("x").ids
    return len(added) > 1 and added[-1] == index
