"""An assistant's answer taken apart while it is written: reasoning, content, tool calls.

It says what `minnow.tokenizer.parse_assistant` says of the whole answer, but without waiting for its end, and a
control token counts only where it really is one. The server and `minnow.load` both read answers with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

from minnow.tokenizer.pieces import Piece
from minnow.tokenizer.special import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL
from minnow.tokenizer.tool_calls import CallArguments, CallBegins, ToolCallReader

T = TypeVar("T")


@dataclass(frozen=True)
class Reasoning:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class Content(Generic[T]):
    """More of the content, with what the caller attached to its tokens (see `Piece.note`)."""

    text: str
    notes: tuple[T, ...] = ()


Event = Reasoning | Content[T] | CallBegins | CallArguments


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()


class AssistantStream(Generic[T]):
    """Turns the pieces of one answer into events.

    Two things must be told before the end can show them different: a `</think>` that nothing opened is text, and a
    call that is cut off is told as far as it goes. Cut off before its name is known, nothing is told of it: its
    markup is nothing that the model said.

    thinking: the prompt has opened the think block, so the answer starts inside it. tools: calls are looked
    for; without tools the tags are text like any other. whole_calls: tell calls once they are whole; one that is
    cut off or no valid call is content, told at its end.
    """

    def __init__(self, *, thinking: bool, tools: bool, whole_calls: bool = False) -> None:
        self._state = _State.REASONING if thinking else _State.CONTENT
        self._may_open = True  # a `<think>` may open the thoughts, or repeat that the prompt has opened them
        self._tools, self._whole_calls = tools, whole_calls
        self._said = {Reasoning: False, Content: False}  # whether anything but white space came
        self._held = ""  # white space at the end, which goes if nothing follows
        self._held_notes: tuple[T, ...] = ()
        self._call: ToolCallReader | None = None
        self._after_call = False  # nothing but white space came since the last call
        self.calls = 0
        """Calls begun so far."""

    @property
    def reasoning(self) -> bool:
        """Whether the answer is inside its reasoning."""
        return self._state is _State.REASONING

    @property
    def calling(self) -> bool:
        """Whether the answer is inside a call."""
        return self._state is _State.CALL

    def push(self, piece: Piece[T]) -> Iterator[Event[T]]:
        """What the next piece tells."""
        if self._state is _State.REASONING:
            if piece.mark and piece.text == END_THINK:
                self._held = ""
                self._state, self._may_open = _State.CONTENT, False
            elif piece.mark and piece.text == THINK and self._may_open and not self._said[Reasoning]:
                self._may_open = False
            else:
                yield from self._reasoning(piece.text)
        elif self._state is _State.CONTENT:
            if piece.mark and piece.text == THINK and self._may_open and not self._said[Content]:
                self._state, self._may_open = _State.REASONING, False
            elif piece.mark and piece.text == TOOL_CALL and self._tools:
                self._call = ToolCallReader(self.calls, whole=self._whole_calls)
                self._state, self._may_open = _State.CALL, False
            else:
                yield from self._content(piece.text, () if piece.note is None else (piece.note,))
        else:
            yield from self._read_call(piece)

    def finish(self) -> Iterator[Event[T]]:
        """What was held back, at the end of the answer."""
        if self._call is not None and not self._call.begun:  # cut off before it was a call
            if not self._whole_calls:
                yield from self._before_call()
                return
            yield from self._content(TOOL_CALL + self._call.unread, ())
        if self._state is not _State.REASONING and self._held and not self._after_call:
            yield Content(self._held, self._held_notes)

    def _reasoning(self, text: str) -> Iterator[Event[T]]:
        text = self._held + text
        if not self._said[Reasoning]:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if shown:
            self._said[Reasoning] = True
            yield Reasoning(shown)

    def _content(self, text: str, notes: tuple[T, ...]) -> Iterator[Event[T]]:
        if not text and not notes:
            return
        text, notes = self._held + text, self._held_notes + notes
        self._held, self._held_notes = "", ()
        if not self._said[Content]:
            blank = text.isspace()
            text = text.lstrip()  # the template's own line breaks
            if blank:
                return
            if not text:  # the first part of a character that takes several tokens
                self._held_notes = notes
                return
        self._said[Content] = True
        self._after_call = self._after_call and not text.strip()
        # The template puts a line break before a call and between two calls; it is content only if more follows.
        if (self._tools and text.endswith("\n")) or self._after_call:
            self._held, self._held_notes = text, notes
            return
        yield Content(text, notes)

    def _read_call(self, piece: Piece[T]) -> Iterator[Event[T]]:
        assert self._call is not None
        if not (piece.mark and piece.text == END_TOOL_CALL):
            again = piece.mark and piece.text == TOOL_CALL
            yield from self._count(self._call.open_again() if again else self._call.push(piece.text))
            return
        call, self._call = self._call, None
        events = list(call.end())
        if call.before is not None:
            yield from self._content(TOOL_CALL + call.before, ())
        yield from self._count(iter(events))
        self._state = _State.CONTENT
        if not call.begun:  # no valid call: it stays as it was written
            yield from self._content(TOOL_CALL + call.unread + END_TOOL_CALL, ())

    def _count(self, events: Iterator[CallBegins | CallArguments]) -> Iterator[Event[T]]:
        for event in events:
            if isinstance(event, CallBegins):
                yield from self._before_call()
                self.calls += 1
                self._after_call = True
            yield event

    def _before_call(self) -> Iterator[Event[T]]:
        """What was held back before a call, without the template's own line break."""
        held = "" if self._after_call else self._held.removesuffix("\n" if not self.calls else "")
        if held:
            yield Content(held, self._held_notes)
        self._held, self._held_notes = "", ()
