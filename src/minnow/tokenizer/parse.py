"""Generated text back to a message: reasoning, content, tool calls.

Tool calls are read as JSON and nothing else; what is no valid call stays in the content as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from minnow.tokenizer.chat import Message, ToolCall
from minnow.tokenizer.special import END_THINK, END_TOOL_CALL, IM_END, THINK, TOOL_CALL
from minnow.tokenizer.tokenizer import Tokenizer

_MARKS = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL, IM_END)


def parse_assistant(text: str, *, thinking: bool = False) -> Message:
    """The assistant's message in `text`, which a model wrote after the generation prompt.

    Args:
        text: what was generated, control tokens shown; it ends at `<|im_end|>` if that is there.
        thinking: the prompt left the think block open (`enable_thinking`), so the text starts inside it and
        has no `<think>` of its own.
    """
    parts = re.split("(" + "|".join(map(re.escape, _MARKS)) + ")", text)
    return _assemble([(part, bool(i % 2)) for i, part in enumerate(parts) if part], thinking)


def parse_assistant_ids(tokenizer: Tokenizer, ids: Sequence[int], *, thinking: bool = False) -> Message:
    """`parse_assistant` of token ids: only real control tokens are read as such, never text that spells
    one."""
    marks = {tokenizer.special_ids[mark]: mark for mark in _MARKS}
    ends = {tokenizer.end_of_text_id: IM_END}
    parts: list[tuple[str, bool]] = []
    text: list[int] = []
    for index in [*ids, tokenizer.im_end_id]:
        mark = marks.get(index) or ends.get(index)
        if mark is None:
            text.append(index)
            continue
        if text:
            parts.append((tokenizer.decode(text), False))
            text = []
        parts.append((mark, True))
    return _assemble(parts, thinking)


def _assemble(parts: list[tuple[str, bool]], thinking: bool) -> Message:
    """`parts`: pieces of text, each with whether it is a control token."""
    if (IM_END, True) in parts:
        parts = parts[: parts.index((IM_END, True))]
    reasoning = ""
    if (END_THINK, True) in parts:
        end = parts.index((END_THINK, True))
        reasoning, parts = _thoughts(parts[:end]), parts[end + 1 :]
    elif thinking or next((part for part in parts if part[0].strip()), None) == (THINK, True):
        reasoning, parts = _thoughts(parts), []  # cut off while it thought
    content, calls = _split_calls(parts)
    return Message("assistant", content.lstrip(), reasoning or None, calls)


def _thoughts(parts: list[tuple[str, bool]]) -> str:
    """What is thought in these pieces, without the tag that opened them, if it is there."""
    first = next((i for i, (text, _) in enumerate(parts) if text.strip()), None)
    if first is not None and parts[first] == (THINK, True):
        parts = parts[first + 1 :]
    return _join(parts).strip()


def _split_calls(parts: list[tuple[str, bool]]) -> tuple[str, tuple[ToolCall, ...]]:
    content = ""
    calls: list[ToolCall] = []
    while parts:
        length = parts.index((END_TOOL_CALL, True)) + 1 if (END_TOOL_CALL, True) in parts else 0
        call = read_call(_join(parts[1 : length - 1])) if parts[0] == (TOOL_CALL, True) and length else None
        if call is None:
            if parts[0][1] or not calls or parts[0][0].strip():
                content += parts[0][0]
            parts = parts[1:]
        else:
            if not calls:
                content = content.removesuffix("\n")  # the one the template puts before a call
            calls.append(call)
            parts = parts[length:]
    return content, tuple(calls)


def read_call(text: str) -> ToolCall | None:
    """The call in what stands between `<tool_call>` and `</tool_call>`; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None


def _join(parts: list[tuple[str, bool]]) -> str:
    return "".join(text for text, _ in parts)
