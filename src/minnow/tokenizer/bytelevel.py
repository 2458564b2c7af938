"""Byte-level vocabularies: which bytes a token stands for, and what splits a text before the merges.

GPT-2 writes every byte as one printable character, so that a vocabulary can be stored as text; a token's
bytes are those of its characters mapped back. (Radford et al. 2019, "Language models are unsupervised
multitask learners".)
"""

from __future__ import annotations

from typing import Any

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""What cuts a text into pieces before the merges: llama.cpp's pre-tokenizer type `qwen2`."""

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern inside the `tokenizers` library's `ByteLevel(use_regex=True)`: llama.cpp's type `gpt-2`."""


def _byte_of_character() -> dict[str, int]:
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER: dict[str, int] = _byte_of_character()
"""Byte that each of the 256 printable stand-in characters means."""


def to_bytes(token: str) -> bytes:
    """Bytes of a byte-level token as the vocabulary writes it (`Ġthe` -> ` the`)."""
    return bytes(BYTE_OF_CHARACTER[character] for character in token)


def components(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A pre-tokenizer, normalizer or decoder of tokenizer.json as a flat list (a `Sequence` is opened)."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def is_byte_level(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json (parsed) writes bytes in GPT-2's printable characters."""
    return any(part["type"] == "ByteLevel" for part in components(definition["decoder"], "decoders"))


def token_byte_strings(definition: dict[str, Any], vocab_size: int) -> list[bytes]:
    """Bytes that each token id adds to a text; b"" for control tokens and for ids nobody uses.

    `definition` is the parsed tokenizer.json. Byte-level vocabularies are exact for every token, half
    characters included; SentencePiece ones write a space as `▁` and a lone byte as `<0xE4>`.
    """
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: (token, score), the id is the position
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    byte_level = is_byte_level(definition)
    control = {token["id"] for token in definition["added_tokens"] if is_control(token)}
    strings = [b""] * vocab_size
    for token, index in vocabulary.items():
        if index in control:
            continue
        if byte_level and all(character in BYTE_OF_CHARACTER for character in token):
            strings[index] = to_bytes(token)
        elif not byte_level and len(token) == 6 and token.startswith("<0x"):
            strings[index] = bytes([int(token[3:5], 16)])
        else:
            strings[index] = token.replace("▁", " ").encode()
    for added in definition["added_tokens"]:
        if not is_control(added):
            strings[added["id"]] = added["content"].encode()
    return strings


def is_control(added_token: dict[str, Any]) -> bool:
    """Whether an added token of tokenizer.json is a control token, and not merely a run of spaces (GPT-NeoX,
    Phi)."""
    return bool(added_token["special"] or added_token["content"].strip())


def valid_unicode(text: str) -> str:
    """`text` with half a surrogate pair (a `\\ud83d` alone in JSON), which has no UTF-8, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
