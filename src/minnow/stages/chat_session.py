"""A conversation with a model: what was said, what still fits the context, and an answer on its way."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minnow.config import UserError
from minnow.engine import Engine, FinishReason, SamplingParams
from minnow.tokenizer.chat import Conversation, Message, Rendered, render
from minnow.tokenizer.images import Image
from minnow.tokenizer.special import END_THINK, THINK


@dataclass(frozen=True)
class Piece:
    """Some of an answer's text."""

    text: str
    reasoning: bool


class ChatSession:
    """The messages so far and the settings of the next answer."""

    def __init__(self, engine: Engine, params: SamplingParams, *, system: str | None = None, thinking: bool = False):
        engine.tokenizer.require_chat_tokens()
        self.engine = engine
        self.params = params
        self.system = system
        self.thinking = thinking
        self.messages: list[Message] = []
        """All that was said, without the system prompt; user and assistant take turns."""
        self.first_read = 0
        """Index of the first message that the model still reads."""
        self.pictures: list[Image] = []
        """What the next message shows before its text."""

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.model.config.max_position_embeddings

    def reset(self) -> None:
        """Forget what was said; system prompt and settings stay."""
        self.messages = []
        self.first_read = 0
        self.pictures = []

    def show(self, file: str) -> None:
        """Have the next message begin with a picture. UserError for what is none, and for a model that only reads."""
        image_format = self.engine.tokenizer.require_images()
        try:
            data = _path(file).read_bytes()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from error
        try:
            image_format.pixels(data)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        self.pictures.append(Image(data))

    def conversation(self, first: int = 0) -> Conversation:
        """The system prompt and the messages from number `first` on."""
        system = () if self.system is None else (Message(role="system", content=self.system),)
        return Conversation(messages=(*system, *self.messages[first:]))

    def ask(self, text: str) -> Answer:
        """Begin the answer to `text`; iterate over it to generate.

        The oldest turns are left unread where they would leave no room. UserError when the message alone is too long.
        """
        self.messages.append(Message(role="user", content=text, images=tuple(self.pictures)))
        first = self.first_read
        prompt = self._prompt(first)
        room = min(self.params.max_tokens or self.context, self.context // 4)
        while len(prompt.ids) + room > self.context and first < len(self.messages) - 1:
            first += 2  # a turn is a question and its answer
            prompt = self._prompt(first)
        if len(prompt.ids) >= self.context:
            self.messages.pop()
            advice = ", or show fewer pictures (/reset forgets them)" if self.pictures else ""
            raise UserError(
                f"your message makes a prompt of {len(prompt.ids)} tokens, but the context is {self.context}: "
                f"say it shorter{advice}"
            )
        self.pictures = []
        forgotten = (first - self.first_read) // 2
        self.first_read = first
        return Answer(self, prompt, forgotten)

    def _prompt(self, first: int) -> Rendered:
        return render(
            self.engine.tokenizer,
            self.conversation(first),
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )


class Answer:
    """An answer on its way: iterate for its pieces; at its end, or at `stop`, it joins the conversation."""

    def __init__(self, session: ChatSession, prompt: Rendered, forgotten: int):
        self.forgotten = forgotten
        """Turns that the model stopped reading to make room."""
        self.num_tokens = len(prompt.ids)
        """Of the prompt and the answer so far."""
        self.finish_reason: FinishReason | None = None
        self._session = session
        self._deltas = session.engine.stream(prompt, session.params)
        self._reasoning = session.thinking  # the prompt has opened the reasoning already
        self._texts = {True: "", False: ""}
        self._stopped = False

    def __iter__(self) -> Iterator[Piece]:
        special = self._session.engine.tokenizer.special_ids
        for delta in self._deltas:
            self.num_tokens += 1
            self.finish_reason = delta.finish_reason
            if delta.id == special[THINK]:
                yield from self._say(delta.text.removesuffix(THINK))
                self._reasoning = True
            elif delta.id == special[END_THINK]:
                yield from self._say(delta.text.removesuffix(END_THINK))
                self._reasoning = False
            else:
                yield from self._say(delta.text)
        self.stop()

    def _say(self, text: str) -> Iterator[Piece]:
        if not self._texts[self._reasoning]:
            text = text.lstrip()  # the template's own line breaks around the reasoning
        if text:
            self._texts[self._reasoning] += text
            yield Piece(text, self._reasoning)

    def stop(self) -> None:
        """End it here. The conversation keeps what was said, or forgets the question if nothing was."""
        if self._stopped:
            return
        self._stopped = True
        self._deltas.close()
        content, reasoning = self._texts[False].rstrip(), self._texts[True].strip()
        if content or reasoning:
            message = Message(role="assistant", content=content, reasoning_content=reasoning or None)
            self._session.messages.append(message)
        else:
            self._session.messages.pop()


def _path(typed: str) -> Path:
    """The file that was typed, which no shell has read: a terminal in which one is dropped quotes it for a shell."""
    path = Path(os.path.expanduser(typed))
    if path.exists():
        return path
    with contextlib.suppress(ValueError):  # a quotation mark without its other half is part of a name
        words = shlex.split(typed)
        if len(words) == 1:
            return Path(os.path.expanduser(words[0]))
    return path
