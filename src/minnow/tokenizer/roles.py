"""Which of a tokenizer's control tokens begin, end and fill: `bos_token`, `eos_token` and their kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from minnow.config import UserError
from minnow.json_file import read_json
from minnow.tokenizer.special import END_OF_TEXT

_NAMES = (END_OF_TEXT, "<|end_of_text|>")  # Llama 3's name for it; its eos_token may be the end of a turn


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Texts of the tokens. What a tokenizer's files said of them is kept, for its chat template may write them."""

    end_of_text: str = END_OF_TEXT
    """Ends a document, and stands before it where `adds_bos` is false."""
    bos: str = END_OF_TEXT
    eos: str = END_OF_TEXT
    pad: str = END_OF_TEXT
    adds_bos: bool = False
    """Whether every text begins with `bos`, as Llama's do."""


def read_roles(folder: Path, tokenizer: tokenizers.Tokenizer) -> Roles:
    """The roles in the files of `folder`. UserError where nothing says what ends a document."""
    config = _config(folder)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = {role: _text(config.get(f"{role}_token")) for role in ("bos", "eos", "pad")}
    end_of_text = next((name for name in _NAMES if name in known), named["eos"])
    if end_of_text is None:
        raise UserError(f"{folder}: the tokenizer has neither {END_OF_TEXT} nor an eos_token to end a document with")
    first = _first_added(tokenizer)
    if first is None and config.get("add_bos_token") and named["bos"] in known:
        first = named["bos"]
    texts = {role: text if text in known else None for role, text in named.items()}
    return Roles(
        end_of_text=end_of_text,
        bos=first or texts["bos"] or end_of_text,
        eos=texts["eos"] or end_of_text,
        pad=texts["pad"] or end_of_text,
        adds_bos=first is not None,
    )


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, over the older special_tokens_map.json."""
    content: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            stored = read_json(folder / name)
            content |= {key: value for key, value in stored.items() if value is not None}
    return content


def _text(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _first_added(tokenizer: tokenizers.Tokenizer) -> str | None:
    """The token that tokenizer.json's post-processor puts before a text, if it does."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return tokenizer.id_to_token(whole[0]) if whole[:1] != plain[:1] else None
