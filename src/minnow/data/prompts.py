"""Prompts to practise on: what is asked, and how to know a good answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minnow.config import UserError
from minnow.data.pictures import TEXT_ONLY
from minnow.data.readers import read_parsed
from minnow.data.records import (
    CONVERSATION_KEYS,
    alpaca_messages,
    parse_conversation,
)
from minnow.data.values import RowError, from_json, keys_of, kind_of
from minnow.tokenizer.chat import Conversation

ASKED_KEYS = ("prompt", "question", "instruction")
REFERENCE_KEYS = ("answer", "reference", "ground_truth", "gt", "solution")


@dataclass(frozen=True)
class Prompt:
    """One thing to ask."""

    conversation: Conversation
    """Up to the user's (or a tool's) last message."""
    reference: Any = None
    """The right answer, where the row has one."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The whole row, for rewards of your own."""


def parse_prompt(row: Mapping[str, Any]) -> Prompt:
    """Read a row. Raises RowError.

    What is asked, the first that is there: a conversation in any format that fine-tuning reads (`conversations`,
    `messages`), `prompt` or `question` (a text or a list of messages), Alpaca's `instruction`. What the assistant says
    at the end of a conversation is dropped (some data sets put a dummy there).
    The right answer: `answer`, `reference`, `ground_truth`, `gt` or `solution`, the first that is there, in the row or
    in its `reward_model` (verl's rows). A blank text, an empty list and a list of blank texts are none.
    """
    found = (place.get(key) for place in answer_places(row) for key in REFERENCE_KEYS)
    return Prompt(_asked(row), next((value for value in found if not _is_blank(value)), None), row)


def _is_blank(value: Any) -> bool:
    """Whether it says nothing: an empty answer would equal it."""
    items = value if isinstance(value, list) else [value]
    return all(item is None or (isinstance(item, str) and not item.strip()) for item in items)


def answer_places(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where a row may hold its right answer: in itself, and in its `reward_model` (verl's rows)."""
    return [place for place in (row, row.get("reward_model")) if isinstance(place, Mapping)]


def read_prompts(paths: Sequence[str]) -> list[Prompt]:
    """Read every row of `paths`. UserError names the first bad one by FILE:LINE."""
    prompts = [prompt for _, prompt in read_parsed(paths, parse_prompt)]
    if not prompts:
        raise UserError(f"{', '.join(paths)}: there is no prompt")
    return prompts


def _asked(row: Mapping[str, Any]) -> Conversation:
    """The conversation up to where the assistant is to speak."""
    key = next((key for key in (*CONVERSATION_KEYS, *ASKED_KEYS) if row.get(key) is not None), None)
    if key is None:
        raise RowError(
            f"no `prompt`, `question` or conversation (`conversations`, `messages`, `instruction`), only {keys_of(row)}"
        )
    if key == "instruction":
        turns: Any = alpaca_messages(row)
    elif key in ASKED_KEYS and isinstance(row[key], str):
        if not row[key].strip():
            raise RowError("the prompt is empty")
        turns = [{"role": "user", "content": row[key]}]
    else:
        turns = from_json(row[key], f"`{key}`")
    return _without_answer(turns, key, row)


def _without_answer(turns: Any, key: str, row: Mapping[str, Any]) -> Conversation:
    """The turns without the assistant's at the end, behind the row's `system`. `parse_conversation` wants one to train
    on: give it one."""
    if not isinstance(turns, list):
        raise RowError(f"`{key}` must be a list of messages, it is {kind_of(turns)}")
    others = {name: value for name, value in row.items() if name not in CONVERSATION_KEYS}
    conversation = parse_conversation(
        {**others, "messages": [*turns, {"role": "assistant", "content": "."}]}, TEXT_ONLY
    )
    messages = conversation.messages
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1].role not in ("user", "tool"):
        raise RowError("the conversation has no user message to answer")
    return Conversation(messages, conversation.tools)
