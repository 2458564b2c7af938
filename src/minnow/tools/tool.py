"""What a tool is, and how a model's call of it is answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minnow.tokenizer.chat import ToolCall

MAX_ERROR = 300
"""Characters of an error that the model reads."""


class ToolError(Exception):
    """What the model did wrong, in words that it reads as the tool's result."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object."""
    function: Callable[..., str]
    """Called with the arguments by name; raises ToolError for arguments that make no sense."""

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as OpenAI's API and the chat template describe it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def call_tool(tools: Sequence[Tool], call: ToolCall) -> str:
    """The result of a call, as text for the model; what it did wrong comes back as {"error": ...}, never as an
    exception, and cut at MAX_ERROR: it may quote arguments without end.

    Arguments must be exactly those of the schema: every required one, none unknown, each of its type.
    """
    by_name = {tool.name: tool for tool in tools}
    try:
        tool = by_name.get(call.name)
        if tool is None:
            raise ToolError(f"there is no tool {call.name!r}; there are {', '.join(by_name) or 'none'}")
        _check(tool, call.arguments)
        return tool.function(**call.arguments)
    except ToolError as error:
        words = str(error)
        words = words if len(words) <= MAX_ERROR else words[:MAX_ERROR] + "..."
        return json.dumps({"error": words}, ensure_ascii=False)


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


def _check(tool: Tool, arguments: Mapping[str, Any]) -> None:
    properties = tool.parameters.get("properties", {})
    missing = [name for name in tool.parameters.get("required", []) if name not in arguments]
    unknown = [name for name in arguments if name not in properties]
    if missing or unknown:
        wanted = ", ".join(properties) or "no arguments"
        raise ToolError(f"{tool.name} takes {wanted}; got {', '.join(arguments) or 'none'}")
    for name, value in arguments.items():
        kind = properties[name].get("type")
        if kind in _TYPES and (not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
            raise ToolError(f"{name} must be of type {kind}")
        options = properties[name].get("enum")
        if options and value not in options:
            raise ToolError(f"{name} must be one of {', '.join(map(str, options))}")
