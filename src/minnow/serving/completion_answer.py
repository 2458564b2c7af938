"""A text completion from the engine's deltas: as the chunks of a stream, or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

from minnow.engine import Delta
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
from minnow.tokenizer import StreamDecoder


class _Choice:
    """One continuation."""

    def __init__(self, model: ServedModel, body: CompletionBody, index: int, prompt_ids: list[int], start: int) -> None:
        self._tokenizer = model.tokenizer
        self._decoder = StreamDecoder(model.tokenizer, skip_special_tokens=True)
        self._index = index
        self._body = body
        self._prompt_ids: list[int] | None = prompt_ids if body.return_token_ids else None
        self._length = start  # characters of the prompt and of the tokens so far
        self._clear()

    def _clear(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: CompletionLogprobs = _no_logprobs(self._body)
        self._finish_reason: Literal["stop", "length"] | None = None

    def push(self, delta: Delta) -> None:
        """Take the next token."""
        self._token_ids.append(delta.id)
        self._finish_reason = delta.finish_reason
        self._texts.append(delta.text)
        if self._body.logprobs is not None:
            self._add_logprob(delta)

    def _add_logprob(self, delta: Delta) -> None:
        """Every token has its entry, also the one that ends the answer: they stand beside `token_ids`."""
        assert delta.raw_logprob is not None
        own, logprob = token_text(self._tokenizer, delta.id), finite(delta.raw_logprob)
        self._logprobs["tokens"].append(own)
        self._logprobs["token_logprobs"].append(logprob)
        self._logprobs["text_offset"].append(self._length)
        if self._logprobs["top_logprobs"] is not None:
            likeliest = delta.top_logprobs or ()
            texts = {token_text(self._tokenizer, token): finite(value) for token, value in likeliest}
            self._logprobs["top_logprobs"].append(texts | {own: logprob})  # as at OpenAI: one more than asked for
        if delta.id < self._tokenizer.vocab_size:  # a model's vocabulary may be padded beyond the tokenizer's
            self._length += len(self._decoder.push(delta.id))

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


class CompletionAnswer:
    """The answer to one request: choice `prompt number x n + sample` continues that prompt.

    starts: where each answer begins, in characters from its prompt's start.
    """

    def __init__(
        self,
        model: ServedModel,
        body: CompletionBody,
        prompts: Sequence[list[int]],
        starts: Sequence[int],
        deltas: AsyncGenerator[tuple[int, Delta], None],
        close: Callable[[], None],
    ) -> None:
        self._body = body
        self._n = body.n or 1
        self._deltas = deltas
        self._close = close
        self._choices = [
            _Choice(model, body, i, prompts[i // self._n], starts[i // self._n]) for i in range(len(prompts) * self._n)
        ]
        self._read = self._written = self._cached = 0
        self._id = new_id("cmpl-")
        self._created = now()

    async def _pushed(self) -> AsyncGenerator[_Choice, None]:
        """The choice that each delta went to."""
        async with aclosing(self._deltas):
            async for number, delta in self._deltas:
                choice = self._choices[number * self._n + delta.index]
                choice.push(delta)
                if delta.usage is not None:
                    self._read += delta.usage.prompt_tokens
                    self._written += delta.usage.completion_tokens
                    self._cached += delta.usage.cached_tokens
                yield choice

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
