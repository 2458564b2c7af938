"""Rows of the Berkeley Function Calling Leaderboard (Patil et al., gorilla, BFCL v4), scored on their syntax trees.

A row's `ground_truth` lists the calls that must be made, each as {function: {argument: [values that count as right]}};
the value "" says that the argument may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minnow.data.readers import read_rows
from minnow.engine.sampling import SamplingParams
from minnow.evaluation.registry import Score, Subject, Task
from minnow.evaluation.statistics import Interval, wilson_interval
from minnow.evaluation.turns import ask
from minnow.tokenizer.chat import Conversation, Message, ToolCall

FILE = "eval/en_bfcl_tools.jsonl.zst"
"""Where the rows lie below MINNOW_DATA."""

_TYPES = {"dict": "object", "float": "number", "tuple": "array"}


@dataclass(frozen=True)
class BfclRow:
    """One question with its functions."""

    category: str
    prompt: Conversation
    ground_truth: Sequence[Mapping[str, Mapping[str, list[Any]]]]


class BfclTask(Task[BfclRow]):
    """Share of rows whose calls are all right and no more, by category; right in `irrelevance` is no call at all."""

    name = "bfcl"
    unit = "share"

    def __init__(self, file: Path) -> None:
        self._rows = [parse(row) for _, row in read_rows([str(file)])]

    def rows(self) -> Sequence[BfclRow]:
        """All rows of the file."""
        return self._rows

    def figure(self, row: BfclRow) -> str:
        """By category."""
        return f"calls/{row.category}"

    def score_rows(self, subject: Subject, rows: Sequence[BfclRow]) -> list[Score]:
        """Ask greedily, one turn; a row whose functions do not fit into the model's context is not answered."""
        answers = ask(subject, [row.prompt for row in rows], SamplingParams(temperature=0.0, max_tokens=512))
        return [self._score(row, answer) for row, answer in zip(rows, answers, strict=True)]

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Wilson's."""
        return wilson_interval(sum(score.value for score in scores), len(scores))

    def _score(self, row: BfclRow, answer: Message) -> Score:
        said_something = bool(answer.content.strip() or answer.tool_calls)
        right = said_something and calls_match(answer.tool_calls, row.ground_truth)
        right = right and all(integers_are_whole(call, row.prompt.tools) for call in answer.tool_calls)
        details = {
            "prompt": row.prompt.messages[-1].content,
            "calls": [vars(call) for call in answer.tool_calls],
            "answer": answer.content,
            "expected": row.ground_truth,
        }
        return Score(float(right), details=details)


def parse(row: Mapping[str, Any]) -> BfclRow:
    """A row of the leaderboard's files with its ground truth joined in; Python's type names become JSON's."""
    messages = tuple(Message(message["role"], message["content"]) for message in row["question"][0])
    tools = tuple({"type": "function", "function": _json_schema(function)} for function in row["function"])
    return BfclRow(row["category"], Conversation(messages, tools), row["ground_truth"])


def _json_schema(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    schema = {key: _json_schema(item) for key, item in value.items()}
    if isinstance(schema.get("type"), str):
        schema["type"] = _TYPES.get(schema["type"], schema["type"])
        if schema["type"] == "any":
            del schema["type"]
    return schema


def calls_match(calls: Sequence[ToolCall], truth: Sequence[Mapping[str, Mapping[str, list[Any]]]]) -> bool:
    """Whether each expected call is made once, in whatever order, and no other."""
    left = list(truth)
    for call in calls:
        fitting = next((e for e in left if call.name in e and arguments_match(call.arguments, e[call.name])), None)
        if fitting is None:
            return False
        left.remove(fitting)
    return not left


def integers_are_whole(call: ToolCall, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no integer is written with a point, alone or in an array: to the leaderboard 5.0 is of the wrong type.

    call: one that is right but for that.
    """
    (schemas,) = (t["function"]["parameters"]["properties"] for t in tools if t["function"]["name"] == call.name)
    for name, value in call.arguments.items():
        schema, items = (schemas[name].get("items", {}), value) if isinstance(value, list) else (schemas[name], [value])
        if schema.get("type") == "integer" and any(isinstance(item, float) for item in items):
            return False
    return True


def arguments_match(arguments: Mapping[str, Any], allowed: Mapping[str, list[Any]]) -> bool:
    """Whether every argument is known and has a right value, and none is missing that may not be."""
    if any(name not in allowed for name in arguments):
        return False
    return all(
        any(value_matches(arguments[name], value) for value in values) if name in arguments else "" in values
        for name, values in allowed.items()
    )


def value_matches(value: Any, expected: Any) -> bool:
    """Numbers by value, texts without case, spaces and punctuation (the leaderboard's rule), lists item by item.

    Inside an object each key has its own list of right values, as arguments have.
    """
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(expected, str):
        return isinstance(value, str) and _standard(value) == _standard(expected)
    if isinstance(expected, Mapping):
        return isinstance(value, Mapping) and arguments_match(value, expected)
    if isinstance(expected, list):
        same_length = isinstance(value, list) and len(value) == len(expected)
        return same_length and all(map(value_matches, value, expected))
    return bool(value == expected)


def _standard(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
