"""Conversations, and their rendering to token ids with a loss weight each.

The rendering is what `chat_template.jinja` says (ChatML as Qwen3 writes it), built from the structure of
the messages: the template's control tokens are control tokens, and everything a person or a tool wrote is
ordinary text, even where it spells `<|im_end|>`. Trained and served sequences are the same ids: a turn is
trained behind exactly the prompt it is served behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from minnow.config import UserError
from minnow.tokenizer.images import Image
from minnow.tokenizer.special import (
    CHAT_TOKENS,
    END_THINK,
    END_TOOL_CALL,
    IM_END,
    IM_START,
    THINK,
    TOOL_CALL,
)
from minnow.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")

_TAGS = frozenset((THINK, END_THINK, TOOL_CALL, END_TOOL_CALL))
"""What structures an assistant's turn."""
_CONTROL = re.compile("(" + "|".join(map(re.escape, CHAT_TOKENS)) + ")")

_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)


@dataclass(frozen=True)
class ToolCall:
    """A function the assistant asks for."""

    name: str
    arguments: Mapping[str, Any]
    """A JSON object."""


@dataclass(frozen=True)
class Message:
    """One message. Raises `UserError` for a role that the chat template does not know."""

    role: str
    """system, user, assistant, or tool (a tool's result)."""
    content: str
    reasoning_content: str | None = None
    """What an assistant thought before it answered."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant calls after its content."""
    weight: float = 1.0
    """Loss weight of what an assistant said: 0 for an answer that is read and not learnt, as OpenAI writes it."""
    images: tuple[Image, ...] = ()
    """Pictures that a user shows, in the order in which they stand in the content."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f"role {self.role!r} of a message is none of {', '.join(ROLES)}")
        if self.images and self.role != "user":
            raise UserError(f"a picture in a message of role {self.role}: only users show pictures")


@dataclass(frozen=True)
class Conversation:
    """Messages, and the JSON schemas of the functions the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    ids: np.ndarray
    """int32 [T]."""
    weights: np.ndarray
    """float32 [T]: loss weight of predicting `ids[t]`."""
    turn_starts: np.ndarray
    """int64 [user messages]: index in `ids` where each user turn starts; a long conversation is cut there."""
    images: tuple[bytes, ...] = ()
    """The pictures' files, in order: each has `ImageFormat.num_tokens` image tokens in `ids`, one after the other."""


def render(
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool = False,
    trained_from: int = 0,
) -> Rendered:
    """Token ids and loss weights of a conversation.

    Every assistant turn has a think block: its reasoning where no user message follows, else an empty one.
    The message's weight is on an assistant's tokens after the header `<|im_start|>assistant\\n` up to and with
    `<|im_end|>`, without an empty think block, which the prompt gives. `add_generation_prompt` opens the
    next assistant turn: with an empty think block, or with an open one where `enable_thinking` is true.
    Messages before index `trained_from` are prompt and carry no loss.
    A picture is an image token for each patch, without a loss and with nothing around it: LLaVA's form, which llama.cpp
    knows as well.
    Raises `UserError` for a tokenizer without chat tokens, and for pictures shown to a model that only reads.
    """
    writer = _Writer(tokenizer)
    _write(writer, conversation, trained=range(trained_from, len(conversation.messages)))
    if add_generation_prompt:
        writer.template(_opening(think=enable_thinking))
    return writer.rendered()


def render_continuation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, enable_thinking: bool = False
) -> list[int]:
    """Ids that follow an assistant turn's `<|im_end|>`: tool results or a user's turn, and the next assistant header.

    For a dialogue kept as tokens: what the model wrote stays the ids it wrote, and is not rendered from text again
    (which might split it otherwise). Appending gives what `render` gives for the whole, as long as no user message
    hides reasoning before it.
    """
    writer = _Writer(tokenizer)
    writer.text("\n")
    for i, message in enumerate(messages):
        if message.role == "tool":
            _write_tool_result(writer, tuple(messages), i)
        else:
            writer.control(IM_START)
            writer.text(f"{message.role}\n")
            _write_content(writer, message)
            _end(writer)
    writer.template(_opening(think=enable_thinking))
    return writer.rendered().ids.tolist()


def training_examples(tokenizer: Tokenizer, conversation: Conversation, *, tag_weight: float = 1.0) -> list[Rendered]:
    """The conversation as examples in which every assistant turn of weight 1 is trained once, as it is served.

    A user message hides the reasoning before it, so a conversation with reasoning ahead of its last user
    message becomes one example per user turn; the turns before that one are its prompt and carry no loss.
    Any other is one example.

    `tag_weight` is the loss weight of the tags that structure a trained turn (think, /think, tool_call, /tool_call),
    known by where they stand in the message: the same words in anybody's text are text.
    """
    messages = conversation.messages
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    if not any(_reasoning(message) for message in messages[: users[-1] if users else 0]):
        writer = _Writer(tokenizer, tag_weight)
        _write(writer, conversation, trained=range(len(messages)))
        return [writer.rendered()]
    examples = []
    for start, end in zip([0, *users], [*users, len(messages)], strict=True):
        if any(message.role == "assistant" and message.weight for message in messages[start:end]):
            writer = _Writer(tokenizer, tag_weight)
            turn = Conversation(messages[:end], conversation.tools)
            _write(writer, turn, trained=range(start, end))
            examples.append(writer.rendered())
    return examples


def written_texts(conversation: Conversation) -> Iterator[str]:
    """Yield what is written in a conversation, for training tokenizers: tools, reasoning, contents and calls.

    Tools and calls come in the template's form, without its control tokens.
    """
    if conversation.tools:
        described = _TOOLS_BEFORE + _described(conversation.tools) + _TOOLS_AFTER
        yield from (text for text in _CONTROL.split(described) if text not in CHAT_TOKENS)
    for message in conversation.messages:
        yield from (text for text in (message.reasoning_content, message.content) if text)
        yield from (_called(call) for call in message.tool_calls)


@lru_cache(maxsize=4)
def _between(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Ids of what stands between two control tokens in every turn: half of all the texts there are to encode."""
    return {text: tokenizer.encode(text) for text in ("\n", "\n\n", "assistant\n")}


class _Writer:
    """Collects control tokens and text; text between two control tokens is encoded as one, as a tokenizer
    would."""

    def __init__(self, tokenizer: Tokenizer, tag_weight: float = 1.0) -> None:
        tokenizer.require_chat_tokens()
        self._tokenizer, self._tag_weight = tokenizer, tag_weight
        self._between = _between(tokenizer)
        self._ids: list[int] = []
        self._weights: list[float] = []
        self._text: list[str] = []
        self._weight = 0.0
        self._turn_starts: list[int] = []
        self._images: list[bytes] = []

    def control(self, token: str, weight: float = 0.0) -> None:
        self.flush()
        self._ids.append(self._tokenizer.special_ids[token])
        self._weights.append(weight * self._tag_weight if token in _TAGS else weight)

    def text(self, text: str, weight: float = 0.0) -> None:
        self._text.append(text)
        self._weight = weight

    def template(self, text: str, weight: float = 0.0) -> None:
        """Text that the template wrote, in which control tokens are meant."""
        for i, part in enumerate(_CONTROL.split(text)):
            if i % 2:
                self.control(part, weight)
            elif part:
                self.text(part, weight)

    def image(self, data: bytes) -> None:
        """A picture: as many image tokens as it has patches."""
        num_tokens = self._tokenizer.require_images().num_tokens
        self._images.append(data)
        self.flush()
        self._ids += [self._tokenizer.image_id] * num_tokens
        self._weights += [0.0] * num_tokens

    def flush(self) -> None:
        """Encode the text so far apart from what follows."""
        if self._text:
            text = "".join(self._text)
            ids = self._between.get(text) or self._tokenizer.encode(text)
            self._ids += ids
            self._weights += [self._weight] * len(ids)
            self._text = []

    def user_turn(self) -> None:
        self.flush()
        self._turn_starts.append(len(self._ids))

    def rendered(self) -> Rendered:
        self.flush()
        return Rendered(
            ids=np.array(self._ids, dtype=np.int32),
            weights=np.array(self._weights, dtype=np.float32),
            turn_starts=np.array(self._turn_starts, dtype=np.int64),
            images=tuple(self._images),
        )


def _write(writer: _Writer, conversation: Conversation, trained: Collection[int]) -> None:
    """Write every message; assistant messages whose index is in `trained` carry loss."""
    messages = conversation.messages
    _write_system(writer, conversation)
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    for i, message in enumerate(messages):
        if message.role == "user" or (message.role == "system" and i > 0):
            if message.role == "user":
                writer.user_turn()
            writer.control(IM_START)
            writer.text(f"{message.role}\n")
            _write_content(writer, message)
            _end(writer)
        elif message.role == "assistant":
            _write_assistant(writer, message, think=i > last_user, weight=message.weight if i in trained else 0.0)
        elif message.role == "tool":
            _write_tool_result(writer, messages, i)


def _write_content(writer: _Writer, message: Message) -> None:
    """A message's text with its pictures in their places."""
    written = 0
    for image in message.images:
        writer.text(message.content[written : image.offset])
        writer.image(image.data)
        written = image.offset
    writer.text(message.content[written:])


def _write_system(writer: _Writer, conversation: Conversation) -> None:
    first = conversation.messages[0] if conversation.messages else None
    system = first.content if first is not None and first.role == "system" else None
    if system is None and not conversation.tools:
        return
    writer.control(IM_START)
    writer.text("system\n" + (system or ""))
    if conversation.tools:
        if system is not None:
            writer.text("\n\n")
        writer.text(_TOOLS_BEFORE)
        writer.text(_described(conversation.tools))
        writer.template(_TOOLS_AFTER)
    _end(writer)


def _write_assistant(writer: _Writer, message: Message, *, think: bool, weight: float) -> None:
    # The prompt is encoded by itself when it is served, so it is encoded by itself here (`flush`). Leading
    # white space would join the prompt's newline in one token and make the two differ: it goes.
    content = message.content.lstrip()
    reasoning = _reasoning(message) if think else ""
    if reasoning:
        writer.control(IM_START)
        writer.text("assistant\n")
        writer.template(f"{THINK}\n", weight)
        writer.flush()
        writer.text(f"{reasoning}\n", weight)
        writer.control(END_THINK, weight)
        writer.text("\n\n", weight)
    else:
        writer.template(_opening(think=False))
        writer.flush()
    writer.text(content, weight)
    for i, call in enumerate(message.tool_calls):
        if content or i > 0:
            writer.text("\n", weight)
        writer.template("<tool_call>\n", weight)
        writer.text(_called(call), weight)
        writer.control("</tool_call>", weight)
    _end(writer, weight)


def _write_tool_result(writer: _Writer, messages: tuple[Message, ...], i: int) -> None:
    """Results that follow each other share one user turn."""
    if i == 0 or messages[i - 1].role != "tool":
        writer.template(f"{IM_START}user")
    writer.template("\n<tool_response>\n")
    writer.text(messages[i].content)
    writer.template("\n</tool_response>")
    if i + 1 == len(messages) or messages[i + 1].role != "tool":
        _end(writer)


def _described(tools: Sequence[Mapping[str, Any]]) -> str:
    return "".join("\n" + _json(tool) for tool in tools)


def _called(call: ToolCall) -> str:
    return f'{{"name": {_json(call.name)}, "arguments": {_json(call.arguments)}}}\n'


def _opening(*, think: bool) -> str:
    """What the prompt of an assistant turn ends with."""
    return f"{IM_START}assistant\n{THINK}\n" + ("" if think else f"\n{END_THINK}\n\n")


def _end(writer: _Writer, weight: float = 0.0) -> None:
    writer.control(IM_END, weight)
    writer.text("\n")


def _reasoning(message: Message) -> str:
    return (message.reasoning_content or "").strip() if message.role == "assistant" else ""


def _json(value: Any) -> str:
    """JSON as transformers' `tojson` filter writes it."""
    return json.dumps(value, ensure_ascii=False)
