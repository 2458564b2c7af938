"""A text completion from the engine's deltas: as the chunks of a stream, or whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from minnow.engine import Delta, PromptLogprobs, TopLogprobs
from minnow.serving.logprobs import finite, token_text
from minnow.serving.models import ServedModel
from minnow.serving.requests import CompletionBody
from minnow.serving.responses import (
    FINGERPRINT,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    new_id,
    now,
    usage,
)
from minnow.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the model reads it and as the client knows it."""

    ids: list[int]
    sent: list[int]
    """Those of the ids that the client sent: of a text, all but the start token."""
    text: str
    """Token ids count as the text they stand for."""


class _Offsets:
    """Where each token begins in a text, in characters."""

    def __init__(self, tokenizer: Tokenizer, start: int) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._length = start

    def next(self, token: int) -> int:
        """That of the next token; parts of one character begin where it does."""
        if token >= self._tokenizer.vocab_size:  # a model's vocabulary may be padded beyond the tokenizer's
            return self._length
        goes_on = self._tokenizer.byte_strings[token][:1]
        if not b"\x80" <= goes_on < b"\xc0":  # half a character before it gets no other half: it is U+FFFD
            self._length += len(self._decoder.finish())
        offset = self._length
        self._length += len(self._decoder.push(token))
        return offset


class _Choice:
    """One continuation."""

    def __init__(self, model: ServedModel, body: CompletionBody, index: int, prompt: Prompt) -> None:
        self._tokenizer = model.tokenizer
        self._offsets = _Offsets(model.tokenizer, len(prompt.text))
        self._index = index
        self._body = body
        self._prompt_ids: list[int] | None = prompt.ids if body.return_token_ids else None
        self._clear()
        if body.echo:
            self._texts.append(prompt.text)

    def _clear(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: CompletionLogprobs = _no_logprobs(self._body)
        self._finish_reason: Literal["stop", "length"] | None = None

    def begin_with(self, prompt: CompletionLogprobs) -> None:
        """Take the log-probabilities of the prompt's tokens, before the first delta."""
        top = prompt["top_logprobs"]
        self._logprobs = {
            "tokens": [*prompt["tokens"]],
            "token_logprobs": [*prompt["token_logprobs"]],
            "top_logprobs": None if top is None else [*top],
            "text_offset": [*prompt["text_offset"]],
        }

    def push(self, delta: Delta) -> None:
        """Take the next token."""
        if self._body.max_tokens == 0:  # nobody asked for it: only the prompt's log-probabilities came with it
            self._finish_reason = "length"
            return
        self._token_ids.append(delta.id)
        self._finish_reason = delta.finish_reason
        self._texts.append(delta.text)
        if self._body.logprobs is not None:
            self._add_logprob(delta)

    def _add_logprob(self, delta: Delta) -> None:
        """Every token has its entry, also the one that ends the answer: they stand beside `token_ids`."""
        assert delta.raw_logprob is not None
        offset = self._offsets.next(delta.id)
        _add(self._logprobs, self._tokenizer, delta.id, delta.raw_logprob, delta.top_logprobs, offset)

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell."""
        return any(self._texts) or bool(self._logprobs["tokens"]) or self._finish_reason is not None

    def take(self) -> CompletionChoice:
        """What came since the last time."""
        choice: CompletionChoice = {
            "index": self._index,
            "text": "".join(self._texts),
            "logprobs": self._logprobs if self._body.logprobs is not None else None,
            "finish_reason": self._finish_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = self._token_ids
        if self._prompt_ids is not None:
            choice["prompt_token_ids"], self._prompt_ids = self._prompt_ids, None
        self._clear()
        return choice


def _no_logprobs(body: CompletionBody) -> CompletionLogprobs:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [] if body.logprobs else None, "text_offset": []}


def _add(
    logprobs: CompletionLogprobs,
    tokenizer: Tokenizer,
    token: int,
    logprob: float | None,
    likeliest: TopLogprobs | None,
    offset: int,
) -> None:
    """Add a token; logprob None stands for one that nothing stands before."""
    own = token_text(tokenizer, token)
    logprobs["tokens"].append(own)
    logprobs["token_logprobs"].append(None if logprob is None else finite(logprob))
    logprobs["text_offset"].append(offset)
    if logprobs["top_logprobs"] is not None:
        texts = {token_text(tokenizer, token): finite(value) for token, value in likeliest or ()}
        # As at OpenAI: one more than asked for.
        logprobs["top_logprobs"].append(None if logprob is None else texts | {own: finite(logprob)})


def _prompt_logprobs(
    tokenizer: Tokenizer, body: CompletionBody, prompt: Prompt, read: PromptLogprobs
) -> CompletionLogprobs:
    """Of the tokens that the client sent; the first has none at OpenAI, and so it has none behind a start token."""
    logprobs = _no_logprobs(body)
    offsets = _Offsets(tokenizer, 0)
    before = len(prompt.ids) - len(prompt.sent)
    likeliest = read.top_logprobs or [None] * len(prompt.ids)
    for place, token in enumerate(prompt.sent):
        logprob = None if place == 0 else read.logprobs[before + place]
        _add(logprobs, tokenizer, token, logprob, likeliest[before + place], offsets.next(token))
    return logprobs


class CompletionAnswer:
    """The answer to one request: choice `prompt number x n + sample` continues that prompt."""

    def __init__(
        self,
        model: ServedModel,
        body: CompletionBody,
        prompts: Sequence[Prompt],
        deltas: AsyncGenerator[tuple[int, Delta], None],
        close: Callable[[], None],
    ) -> None:
        self._tokenizer = model.tokenizer
        self._body = body
        self._prompts = prompts
        self._n = body.n or 1
        self._deltas = deltas
        self._close = close
        self._choices = [_Choice(model, body, i, prompts[i // self._n]) for i in range(len(prompts) * self._n)]
        self._read = self._written = self._cached = 0
        self._id = new_id("cmpl-")
        self._created = now()

    async def _pushed(self) -> AsyncGenerator[_Choice, None]:
        """The choice that each delta went to."""
        async with aclosing(self._deltas):
            async for number, delta in self._deltas:
                if delta.prompt_logprobs is not None:
                    await self._take_prompt(number, delta.prompt_logprobs)
                choice = self._choices[number * self._n + delta.index]
                choice.push(delta)
                if delta.usage is not None:
                    self._read += delta.usage.prompt_tokens
                    self._written += 0 if self._body.max_tokens == 0 else delta.usage.completion_tokens
                    self._cached += delta.usage.cached_tokens
                yield choice

    async def _take_prompt(self, number: int, read: PromptLogprobs) -> None:
        """Let the choices of a prompt begin with its tokens; a long one is written in another thread."""
        prompt = self._prompts[number]
        logprobs = await asyncio.to_thread(_prompt_logprobs, self._tokenizer, self._body, prompt, read)
        for choice in self._choices[number * self._n : (number + 1) * self._n]:
            choice.begin_with(logprobs)

    async def whole(self) -> Completion:
        """The answer once it is complete."""
        try:
            async with aclosing(self._pushed()) as pushed:
                async for _ in pushed:
                    pass
        finally:
            self._close()
        return self._completion([choice.take() for choice in self._choices], self._usage())

    async def chunks(self) -> AsyncGenerator[list[Mapping[str, Any]], None]:
        """The events of the stream."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        async with aclosing(self._pushed()) as pushed:
            async for choice in pushed:
                if choice.has_news:
                    chunk = self._completion([choice.take()], None)
                    if not with_usage:
                        del chunk["usage"]
                    yield [chunk]
        if with_usage:
            yield [self._completion([], self._usage())]

    def _completion(self, choices: list[CompletionChoice], counts: Usage | None) -> Completion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._body.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            "usage": counts,
        }

    def _usage(self) -> Usage:
        return usage(self._read, self._written, self._cached)
