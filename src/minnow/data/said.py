"""What a row says, whatever kind of record it is: what `minnow data clean` counts, reads and compares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minnow.data.pairs import SIDES, parse_preference
from minnow.data.pictures import READ, Pictures
from minnow.data.prompts import REFERENCE_KEYS, answer_places, parse_prompt
from minnow.data.records import canonical, is_conversation, parse_conversation, parse_document
from minnow.data.values import RowError
from minnow.tokenizer.chat import Conversation, Message

RowKind = Literal["text", "conversation", "preference", "prompt"]

_ANSWER_KEYS = (*REFERENCE_KEYS, "completion", "response")


@dataclass(frozen=True)
class Said:
    """The words of one row."""

    kind: RowKind
    text: str
    """Everything, system messages included."""
    talk: str
    """What rows are compared by: `text` without the system messages, which whole data sets share. Neither has tools."""
    answers: str
    """The part of `talk` that is learnt: the assistants' messages (but those of weight 0), both answers of a pair, a
    right answer to practise on. Rows about one long passage differ only here. "" for a text, which is learnt whole."""
    shows_pictures: bool
    """Whether users show pictures: then words alone do not tell whether rows are alike."""
    digest: bytes
    """16 bytes, the same for rows that say exactly the same and teach the same of it, whatever format they came in."""


def read_said(row: Mapping[str, Any], pictures: Pictures = READ) -> Said:
    """Read a row: a preference pair, a conversation, a prompt to practise on, or a text. Raises RowError."""
    if any(row.get(side) is not None for side in SIDES):
        return _of_pair(row)
    if is_conversation(row):
        try:
            conversation = parse_conversation(row, pictures)
        except RowError as error:
            try:
                return _of_prompt(row)  # it ends with the user: nothing to train on yet, but something to practise on
            except RowError:
                raise error from None
        messages = conversation.messages
        learnt = _words(m for m in messages if m.role == "assistant" and m.weight)
        return _said("conversation", messages, learnt, conversation, extra=_right_answers(row, REFERENCE_KEYS))
    if any(row.get(key) is not None for key in ("prompt", "question")):
        return _of_prompt(row)
    text = parse_document(row).text
    return Said("text", text, text, "", False, _digest(text.encode()))


def _of_pair(row: Mapping[str, Any]) -> Said:
    pair = parse_preference(row)
    chosen = Conversation((*pair.prompt, *pair.chosen), pair.tools)
    answers = (*pair.chosen, *pair.rejected)
    return _said("preference", (*pair.prompt, *answers), _words(answers), chosen, Conversation(pair.rejected))


def _of_prompt(row: Mapping[str, Any]) -> Said:
    conversation = parse_prompt(row).conversation
    return _said("prompt", conversation.messages, "", conversation, extra=_right_answers(row, _ANSWER_KEYS))


def _said(kind: RowKind, messages: Sequence[Message], answers: str, *parts: Conversation, extra: str = "") -> Said:
    talk = _words(message for message in messages if message.role != "system")
    if extra:
        talk, answers = f"{talk}\n{extra}", f"{answers}\n{extra}" if answers else extra
    system = _words(message for message in messages if message.role == "system")
    weights = bytes(message.weight > 0 for message in messages)  # `canonical` leaves them out
    digest = _digest(b"\0".join([kind.encode(), *map(canonical, parts), extra.encode(), weights]))
    shows_pictures = any(message.images for message in messages)
    return Said(kind, f"{system}\n{talk}" if system else talk, talk, answers, shows_pictures, digest)


def _right_answers(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """What a row to practise on says is right."""
    return "\n".join(
        _as_text(place[key]) for place in answer_places(row) for key in keys if place.get(key) not in (None, "", [])
    )


def _words(messages: Iterable[Message]) -> str:
    """Reasoning, content and calls of messages, a line each."""
    lines: list[str] = []
    for message in messages:
        lines += [part for part in (message.reasoning_content, message.content) if part]
        lines += [f"{call.name} {_as_text(call.arguments)}" for call in message.tool_calls]
    return "\n".join(lines)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
