"""A tool call read while it is written: its name at once, its arguments piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from minnow.json_file import json_text
from minnow.tokenizer.bytelevel import valid_unicode
from minnow.tokenizer.parse import read_call
from minnow.tokenizer.special import TOOL_CALL

_NAME = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'  # a string of JSON, and nothing else
_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*({_NAME})\s*,\s*"arguments"\s*:\s*(?=\{{)')


@dataclass(frozen=True)
class CallBegins:
    """Call number `index` is to the function `name`."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the arguments' JSON."""

    index: int
    text: str


class ToolCallReader:
    """Reads what stands between `<tool_call>` and `</tool_call>`.

    whole: tell a call at its end, and only where it is a valid one.
    """

    def __init__(self, index: int, *, whole: bool = False) -> None:
        self._index = index
        self._whole = whole
        self._head = ""
        self._openings = [0]  # places in it where a call may begin
        self._depth = 0
        self._in_string = self._escaped = False
        self._complete = False
        self.begun = False
        """Whether the name is known and has been told."""
        self.before: str | None = None
        """Text that stood before a further `<tool_call>` and was no call, once the call behind that has begun."""

    @property
    def unread(self) -> str:
        """The text so far, as long as it has not begun to be a call."""
        return "" if self.begun else self._head

    def push(self, text: str) -> Iterator[CallBegins | CallArguments]:
        """What the next piece of text tells."""
        if self.begun:
            yield from self._arguments(text)
            return
        self._head += text
        match = None if self._whole else _HEAD.match(self._head)
        if match is None:
            return
        yield from self._begin(json.loads(match[1]))
        yield from self._arguments(self._head[match.end() :])

    def open_again(self) -> Iterator[CallBegins | CallArguments]:
        """A further `<tool_call>` has come: a call may begin behind it, where what stands before is none."""
        yield from self.push(TOOL_CALL)
        self._openings.append(len(self._head))

    def end(self) -> Iterator[CallBegins | CallArguments]:
        """`</tool_call>` has come: what has not begun, such as a call written in an unusual order, is told whole."""
        if self.begun:
            return
        for opening in self._openings:
            call = read_call(self._head[opening:])
            if call is not None:
                self.before = self._head[: opening - len(TOOL_CALL)] if opening else None
                yield from self._begin(call.name)
                yield CallArguments(self._index, json_text(call.arguments))
                return

    def _begin(self, name: str) -> Iterator[CallBegins]:
        self.begun = True
        yield CallBegins(self._index, valid_unicode(name))  # it may hold half a surrogate pair

    def _arguments(self, text: str) -> Iterator[CallArguments]:
        """The part of `text` that belongs to the arguments' object."""
        for place, character in enumerate(text):
            if self._complete:
                text = text[:place]
                break
            self._step(character)
        if text:
            yield CallArguments(self._index, text)

    def _step(self, character: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self._complete = self._depth == 0
