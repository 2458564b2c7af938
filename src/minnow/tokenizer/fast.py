"""The fast path: tiktoken's core over a `tokenizers` BPE's own merges, where the ids are provably the same.

tiktoken merges any two neighbours whose bytes together are a token; BPE merges only the pairs it learnt. The
two agree when (1) no token is the result of two different merges and (2) every merged token, encoded alone,
gives itself: then, inside the borders that a merge will have, all earlier merges happened as they do for the
token alone, so the neighbours are the learnt pair. `build` checks both and returns None for a tokenizer that
fails or that uses anything else (a normaliser, another pre-tokenizer, dropout).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tiktoken
import tokenizers

from minnow.tokenizer.bytelevel import GPT2_PATTERN, components, is_byte_level, is_control, to_bytes

MAX_WHITE_SPACE = 100_000


def build(definition: dict[str, Any]) -> tiktoken.Encoding | None:
    """tiktoken's core with the merges of a tokenizer.json (parsed), or None where its ids could differ."""
    pattern = _pattern(definition)
    ranks = _ranks(definition) if pattern is not None else None
    if pattern is None or ranks is None:
        return None
    return tiktoken.Encoding("minnow", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _pattern(definition: dict[str, Any]) -> str | None:
    """The regex that cuts a text into pieces, or None where something else also does."""
    plain = (
        definition["normalizer"] is None
        and is_byte_level(definition)
        and all(is_control(token) for token in definition["added_tokens"])
    )
    if not plain:
        return None
    parts = components(definition["pre_tokenizer"], "pretokenizers")
    byte_level = parts[-1] if parts and parts[-1]["type"] == "ByteLevel" else None
    if byte_level is None or byte_level["add_prefix_space"]:
        return None
    if len(parts) == 1 and byte_level["use_regex"]:
        return GPT2_PATTERN
    if len(parts) == 2 and not byte_level["use_regex"] and parts[0]["type"] == "Split":
        split = parts[0]
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return str(split["pattern"]["Regex"])
    return None


def _ranks(definition: dict[str, Any]) -> dict[bytes, int] | None:
    """Bytes -> id of the 256 bytes and every merge result, or None where id order is not merge order."""
    model = definition["model"]
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(key) for key in odd) or model.get("byte_fallback"):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    single = {token: index for token, index in vocabulary.items() if len(token) == 1}
    merged = ["".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    ids = [vocabulary[token] for token in merged]
    in_order = all(a < b for a, b in zip([max(single.values(), default=0), *ids], ids, strict=False))
    if not in_order or not _encode_to_themselves(definition, ids, merged):
        return None
    try:
        ranks = {to_bytes(token): index for token, index in single.items()}
        ranks |= {to_bytes(token): index for token, index in zip(merged, ids, strict=True)}
    except KeyError:  # a token that is not written in the 256 characters
        return None
    return ranks if len(single) == 256 else None


def _encode_to_themselves(definition: dict[str, Any], ids: list[int], tokens: list[str]) -> bool:
    plain = definition | {"added_tokens": [], "pre_tokenizer": None, "post_processor": None}
    plain["model"] = definition["model"] | {"ignore_merges": False}
    encodings = tokenizers.Tokenizer.from_str(json.dumps(plain)).encode_batch(tokens, add_special_tokens=False)
    return all(encoding.ids == [index] for encoding, index in zip(encodings, ids, strict=True))


def can_encode(text: str) -> bool:
    """False for a text with a run of white space so long that tiktoken's regex would run out of stack.

    That is near a million characters; a tenth of it goes the slow way already.
    """
    half = MAX_WHITE_SPACE // 2
    return len(text) <= MAX_WHITE_SPACE or not any(
        text[i].isspace() and text[i : i + half].isspace() for i in range(0, len(text), half)
    )


def encode_batch(core: tiktoken.Encoding, texts: Sequence[str], num_threads: int) -> list[list[int]]:
    """Ids of every text. Threads take slices of texts: a task per text costs more than a short text's ids."""
    size = max(1, -(-len(texts) // (num_threads * 4)))
    slices = [texts[i : i + size] for i in range(0, len(texts), size)]
    with ThreadPoolExecutor(num_threads) as pool:
        parts = pool.map(lambda part: [core.encode_ordinary(text) for text in part], slices)
        return [ids for part in parts for ids in part]
