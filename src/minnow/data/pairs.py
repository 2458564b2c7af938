"""Preference pairs: two answers to one prompt, a better and a worse one.

A row holds `chosen` and `rejected`: whole conversations that share their beginning, or the answers alone (messages, one
message, or text) behind a `prompt` (messages or text), behind `conversations`/`messages`, or behind Alpaca's
`instruction`/`input`. Messages may have any form that conversations may have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from minnow.data.pictures import TEXT_ONLY
from minnow.data.records import (
    CONVERSATION_KEYS,
    alpaca_messages,
    behind_system,
    canonical,
    check_order,
    parse_message,
    parse_tools,
    with_pictures,
)
from minnow.data.values import RowError, from_json, keys_of, kind_of
from minnow.tokenizer.chat import Conversation, Message, Rendered, render
from minnow.tokenizer.tokenizer import Tokenizer

SIDES = ("chosen", "rejected")
# Messages as JSON, or none of them; a text may begin with a bracket, too: "[1, 2]: which is more?"
_JSON_MESSAGES = re.compile(r"\s*\[\s*(\{|\]\s*\Z)")


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two answers; each answer starts with an assistant's message."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def canonical(self) -> bytes:
        """The prompt alone as bytes: hashed for the split, it puts all pairs of a prompt on the same side."""
        return canonical(Conversation(self.prompt, self.tools))

    def render(self, tokenizer: Tokenizer) -> tuple[Rendered, Rendered]:
        """Both conversations, (chosen, rejected), by the same rules; only the answers carry loss."""
        chosen, rejected = (
            render(tokenizer, Conversation((*self.prompt, *answer), self.tools), trained_from=len(self.prompt))
            for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected


def parse_preference(row: Mapping[str, Any]) -> PreferencePair:
    """Read a preference row. Raises RowError."""
    if any(row.get(side) is None for side in SIDES):
        raise RowError(f"no `chosen` with a `rejected`, only {keys_of(row)}")
    prompt = _prompt(row)
    answers = [_answer(row[side], f"`{side}`", bool(prompt)) for side in SIDES]
    prompt, *answers = (with_pictures(row, raw, looks=False) for raw in (prompt, *answers))
    chosen, rejected = (behind_system(row, _conversation(prompt, answer)) for answer in answers)
    if chosen == rejected:
        raise RowError("`chosen` and `rejected` are the same: nothing is preferred")
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    for side, messages in zip(SIDES, (chosen, rejected), strict=True):
        check_order(messages)
        if len(messages) == shared:
            raise RowError(f"`{side}` ends where the other one goes on: it holds no answer of its own")
        if messages[shared].role != "assistant":
            raise RowError(
                f"`chosen` and `rejected` answer different prompts: message {shared + 1} ({messages[shared].role}) of "
                f"`{side}` differs"
            )
    tools = parse_tools(row, [*prompt, *answers[0], *answers[1]])
    return PreferencePair(chosen[:shared], chosen[shared:], rejected[shared:], tools)


def _prompt(row: Mapping[str, Any]) -> list[Any]:
    """Raw messages of what stands before both answers; empty where each side is a whole conversation."""
    key = next((key for key in (*CONVERSATION_KEYS, "prompt") if row.get(key) is not None), None)
    if key is None:
        return alpaca_messages(row) if row.get("instruction") is not None else []
    value = row[key]
    if key == "prompt" and isinstance(value, str) and not _JSON_MESSAGES.match(value):
        return [{"role": "user", "content": value}]
    value = from_json(value, f"`{key}`")
    if not isinstance(value, list):
        raise RowError(f"`{key}` must be a list of messages, it is {kind_of(value)}")
    return value


def _answer(value: Any, what: str, has_prompt: bool) -> list[Any]:
    """Raw messages of one side."""
    if isinstance(value, str):
        if has_prompt:
            return [{"role": "assistant", "content": value}]
        value = from_json(value, what)
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list):
        raise RowError(f"{what} must be a list of messages, one message or text, it is {kind_of(value)}")
    return value


def _conversation(prompt: list[Any], answer: list[Any]) -> tuple[Message, ...]:
    """The whole conversation of one side; an answer that repeats the prompt is already one, also where only one of
    the two begins with the system message."""
    numbered = enumerate([*prompt, *answer], 1)  # weights of messages are for imitation
    both = [replace(parse_message(item, number, TEXT_ONLY), weight=1.0) for number, item in numbered]
    opening, before = _split_opening(both[: len(prompt)])
    own_opening, messages = _split_opening(both[len(prompt) :])
    differ = opening and own_opening and opening != own_opening
    if differ or messages[: len(before)] != before:
        return (*opening, *before, *own_opening, *messages)
    return (*(opening or own_opening), *messages)


def _split_opening(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system message that stands first, if one does, and the others."""
    length = int(bool(messages) and messages[0].role == "system")
    return messages[:length], messages[length:]
