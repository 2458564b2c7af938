"""Conversations in OpenAI's form: what servers are sent, and what chat templates of other models are given."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from minnow.tokenizer.chat import Message, ToolCall


def openai_messages(messages: Sequence[Message], *, arguments_as_text: bool) -> list[dict[str, Any]]:
    """Messages with `reasoning_content` and `tool_calls` where they have them.

    Calls are numbered, and results take the numbers of the calls before them in order, as templates pair them.
    `arguments_as_text`: the calls' arguments are the text of a JSON object, as servers want them; else the object, as
    transformers gives it to templates.
    """
    numbers = count()
    waiting: list[tuple[str, str]] = []  # (id, name) of the calls that no result has answered yet
    written = []
    for message in messages:
        item: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool":
            identity, name = waiting.pop(0) if waiting else (_identity(numbers), "")
            item |= {"tool_call_id": identity} | ({"name": name} if name else {})
        else:
            waiting = []
        if message.reasoning_content:
            item["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            waiting = [(_identity(numbers), call.name) for call in message.tool_calls]
            item["tool_calls"] = [
                {"id": identity, "type": "function", "function": _function(call, arguments_as_text)}
                for (identity, _), call in zip(waiting, message.tool_calls, strict=True)
            ]
        written.append(item)
    return written


def nameless_tool(tools: Sequence[Mapping[str, Any]]) -> int | None:
    """Number of the first tool that has no name, from 1: no call could name it. None where all have one."""
    return next((number for number, tool in enumerate(tools, 1) if tool_name(tool) is None), None)


def openai_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools as servers are sent them: each in the `function` wrapper, which rows may leave out."""
    return [{"type": "function", **(tool if "function" in tool else {"function": _plain(tool)})} for tool in tools]


def tool_name(tool: Mapping[str, Any]) -> str | None:
    """The function's name, with or without the wrapper; None where there is none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and name else None


def _plain(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function without the wrapper; some write its `type` beside the name."""
    return {key: value for key, value in tool.items() if key != "type"}


def _function(call: ToolCall, arguments_as_text: bool) -> dict[str, Any]:
    arguments = dict(call.arguments)
    return {
        "name": call.name,
        "arguments": json.dumps(arguments, ensure_ascii=False) if arguments_as_text else arguments,
    }


def _identity(numbers: Iterator[int]) -> str:
    """Nine letters and digits: Mistral's templates take no other ids."""
    return f"call{next(numbers):05d}"
