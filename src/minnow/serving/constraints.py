"""What an answer must look like: `response_format`, `tools` and `tool_choice` as a grammar for llguidance.

The grammar is Lark text in llguidance's dialect, and JSON is written as the chat template writes it: see
`minnow.engine.grammar`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llguidance import LLMatcher

from minnow.engine.grammar import GrammarError, call_rules, schema_text
from minnow.serving.errors import APIError
from minnow.serving.requests import (
    ChatBody,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.special import END_THINK


def answer_grammar(tokenizer: Tokenizer, body: ChatBody) -> str | None:
    """The grammar of the answer from the end of the prompt on; None where anything goes.

    APIError 400 where a schema is not valid or cannot be obeyed.
    """
    tools = body.usable_tools
    schema = _schema(body.response_format)
    if not tools and schema is None:
        return None
    try:
        rules = _rules(tokenizer, body, tools, schema)
    except RecursionError:
        raise APIError(400, "a JSON schema is nested too deeply") from None
    error = LLMatcher.validate_grammar(rules)
    if error:
        param = constraining_field(body)
        reason = error.strip().splitlines()[0]
        raise APIError(400, f"A JSON schema of '{param}' cannot be followed: {reason}", param=param)
    return rules


def constraining_field(body: ChatBody) -> str:
    """The field of the request that the grammar of its answer comes from."""
    return "tools" if _schema(body.response_format) is None else "response_format"


@contextmanager
def grammar_at_fault(body: ChatBody) -> Iterator[None]:
    """Within it, a grammar that shows itself too large only when it is compiled or followed is the client's mistake."""
    try:
        yield
    except GrammarError as error:
        raise APIError(400, str(error), param=constraining_field(body)) from error


def _rules(tokenizer: Tokenizer, body: ChatBody, tools: list[Tool], schema: dict[str, Any] | None) -> str:
    thought = f'TEXT <[{tokenizer.special_ids[END_THINK]}]> "\\n\\n" ' if body.thinking else ""
    content = "TEXT" if schema is None else f"%json {schema_text(schema)}"
    one_only = body.parallel_tool_calls is False or isinstance(body.tool_choice, NamedToolChoice)
    calls = "call" if one_only else 'call ("\\n" call)*'
    if not tools:
        answer = "content"
    elif body.must_call:
        answer = calls
    elif schema is None:
        answer = f"content ({calls})?"
    else:
        answer = f"content | {calls}"
    lines = [
        f"start: {thought}answer",
        f"answer: {answer}",
        f"content: {content}",
        "TEXT: /(.|\\n)*/",
    ]
    rules = "\n".join(lines) + "\n"
    if not tools:
        return rules
    callable_tools = [
        {"name": tool.function.name, "parameters": _arguments(tool)}
        for tool in tools
        if body.chosen_names is None or tool.function.name in body.chosen_names
    ]
    return rules + call_rules(tokenizer, callable_tools)


def _schema(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    if isinstance(response_format, JsonObjectFormat):
        return {"type": "object"}
    if isinstance(response_format, JsonSchemaFormat):
        return response_format.json_schema.schema_
    return None


def _arguments(tool: Tool) -> dict[str, Any]:
    """The schema of a call's arguments: an object, with the properties that are named and no others.

    Anything but an object is no call that a client could read: of several types the object is the one that counts.
    """
    parameters = tool.function.parameters or {}
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        reason = f"the 'type' of its parameters is {kind!r}, but arguments are an object: write 'object'"
        raise APIError(400, f"The function {tool.function.name!r} of 'tools' cannot be called: {reason}", param="tools")
    schema: dict[str, Any] = {**parameters, "type": "object"}
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema
