"""Prompts to practise on: what is asked, and how to know a good answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minnow.config import UserError
from minnow.data.readers import read_rows
from minnow.data.records import RowError, from_json, kind_of, parse_conversation
from minnow.tokenizer.chat import Conversation, Message

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

    What is asked: `prompt` or `question` (a text), `prompt` as a list of messages, or a conversation in any format
    that fine-tuning reads; its last message is dropped if it is the assistant's (some data sets put a dummy there).
    The right answer: `answer`, `reference`, `ground_truth`, `gt` or `solution`, the first that is there.
    """
    reference = next((row[key] for key in REFERENCE_KEYS if row.get(key) is not None), None)
    asked = row.get("prompt", row.get("question"))
    if isinstance(asked, str):
        if not asked.strip():
            raise RowError("the prompt is empty")
        system = row.get("system")
        opening = (Message("system", system),) if isinstance(system, str) and system else ()
        conversation = Conversation((*opening, Message("user", asked)), _tools(row))
    else:
        turns = row if asked is None else {**row, "messages": asked}
        conversation = _without_answer(turns)
    return Prompt(conversation, reference, row)


def read_prompts(paths: Sequence[str]) -> list[Prompt]:
    """Read every row of `paths`. UserError names the first bad one by FILE:LINE."""
    prompts = list(_parsed(paths))
    if not prompts:
        raise UserError(f"{', '.join(paths)}: there is no prompt")
    return prompts


def _parsed(paths: Sequence[str]) -> Iterator[Prompt]:
    for where, row in read_rows(paths):
        try:
            yield parse_prompt(row)
        except RowError as error:
            raise UserError(f"{where}: {error}") from None


def _without_answer(row: Mapping[str, Any]) -> Conversation:
    """The conversation without its last assistant message. `parse_conversation` wants one to train on: give it one."""
    key = next((key for key in ("conversations", "messages") if row.get(key) is not None), None)
    if key is None:
        raise RowError(f"no `prompt`, `question` or conversation, only {', '.join(sorted(row))}")
    turns = from_json(row[key], f"`{key}`")
    if not isinstance(turns, list):
        raise RowError(f"`{key}` must be a list of messages, it is {kind_of(turns)}")
    conversation = parse_conversation({**row, key: [*turns, {"role": "assistant", "content": "."}]})
    messages = conversation.messages[:-1]
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1].role not in ("user", "tool"):
        raise RowError("the conversation has no user message to answer")
    return Conversation(messages, conversation.tools)


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    if not row.get("tools"):
        return ()
    turns = [{"role": role, "content": "."} for role in ("user", "assistant")]
    return parse_conversation({"messages": turns, "tools": row["tools"]}).tools
