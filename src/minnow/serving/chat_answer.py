"""A chat answer from the engine's deltas: as the chunks of a stream, or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

from minnow.engine import Delta
from minnow.serving.constraints import grammar_at_fault
from minnow.serving.logprobs import token_logprob
from minnow.serving.models import Generation, ServedModel
from minnow.serving.requests import ChatBody, NamedToolChoice
from minnow.serving.responses import (
    FINGERPRINT,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FinishReason,
    TokenLogprob,
    Usage,
    new_id,
    now,
    usage,
)
from minnow.tokenizer.assistant import AssistantStream, Content, Event, Reasoning
from minnow.tokenizer.pieces import PieceStream
from minnow.tokenizer.special import END_THINK
from minnow.tokenizer.tool_calls import CallBegins


class _Choice:
    """One of the `n` answers: what the engine says of it, as deltas for the client."""

    def __init__(self, model: ServedModel, body: ChatBody, index: int) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.reasoning_tokens = 0
        self.token_ids: list[int] = []  # not yet told
        self._tokenizer = model.tokenizer
        self._end_think = model.tokenizer.special_ids[END_THINK]
        self._thought = False  # whether the thoughts have their end
        self._named = isinstance(body.tool_choice, NamedToolChoice)
        self._pieces: PieceStream[TokenLogprob] = PieceStream(model.tokenizer)
        self._assistant: AssistantStream[TokenLogprob] = AssistantStream(
            thinking=body.thinking, tools=bool(body.usable_tools)
        )

    def push(self, delta: Delta) -> Iterator[Event[TokenLogprob]]:
        """What the next token tells."""
        self.token_ids.append(delta.id)
        # By the token and not by what it tells: its text may be held back for a stop string.
        self.reasoning_tokens += self._assistant.reasoning and not self._thought
        self._thought = self._thought or delta.id == self._end_think
        note = token_logprob(self._tokenizer, delta)
        for piece in self._pieces.push([delta.id], [note], delta.text):
            yield from self._assistant.push(piece)
        if delta.finish_reason is not None:
            yield from self._assistant.finish()
            # As at OpenAI, a function that was named is called with finish_reason stop. A call that a stop string cut
            # off is none that a client could make.
            whole = delta.finish_reason == "stop" and not self._assistant.calling
            called = self._assistant.calls and whole and not self._named
            self.finish_reason = "tool_calls" if called else delta.finish_reason


class ChatAnswer:
    """The answer to one request."""

    def __init__(self, model: ServedModel, body: ChatBody, prompt_ids: list[int], generation: Generation) -> None:
        self._body = body
        self._prompt_ids = prompt_ids
        self._generation = generation
        self._choices = [_Choice(model, body, index) for index in range(body.n or 1)]
        self._id = new_id("chatcmpl-")
        self._created = now()
        self.close = generation.close

    async def whole(self) -> ChatCompletion:
        """The answer once it is complete: its deltas, folded."""
        choices = [_WholeChoice(choice.index) for choice in self._choices]
        counts: Usage | None = None
        try:
            async for delta in self._generation:
                for event in self._choices[delta.index].push(delta):
                    choices[delta.index].add(event)
                counts = self._usage(delta) or counts
        finally:
            self.close()
        assert counts is not None
        answer: ChatCompletion = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._body.model,
            "choices": [whole.choice(choice, self._body) for whole, choice in zip(choices, self._choices, strict=True)],
            "usage": counts,
            "system_fingerprint": FINGERPRINT,
        }
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = self._prompt_ids
        return answer

    async def chunks(self) -> AsyncGenerator[list[Mapping[str, Any]], None]:
        """The events of the stream, those of one token together."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        begins: ChatDelta = {"role": "assistant", "content": None if self._body.must_call else "", "refusal": None}
        first = [self._chunk([_chunk_choice(choice.index, begins)]) for choice in self._choices]
        if self._body.return_token_ids:
            first[0]["prompt_token_ids"] = self._prompt_ids
        counts: Usage | None = None
        yield list(first)
        with grammar_at_fault(self._body):
            async for delta in self._generation:
                choice = self._choices[delta.index]
                parts = [_chunk_choice(choice.index, *_delta(event, self._body)) for event in choice.push(delta)]
                if choice.finish_reason is not None:
                    parts.append(_chunk_choice(choice.index, {}, finish_reason=choice.finish_reason))
                if parts and self._body.return_token_ids:
                    parts[-1]["token_ids"], choice.token_ids = choice.token_ids, []
                counts = self._usage(delta) or counts
                if parts:
                    yield [self._chunk([part]) for part in parts]
        if with_usage:
            yield [{**self._chunk([]), "usage": counts}]

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        chunk: ChatChunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._body.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self, delta: Delta) -> Usage | None:
        if delta.usage is None:
            return None
        counts = usage(delta.usage.prompt_tokens, delta.usage.completion_tokens, delta.usage.cached_tokens)
        counts["completion_tokens_details"] = {"reasoning_tokens": sum(c.reasoning_tokens for c in self._choices)}
        return counts


def _delta(event: Event[TokenLogprob], body: ChatBody) -> tuple[ChatDelta, ChatLogprobs | None]:
    """An event as a chunk says it, with its log-probabilities."""
    if isinstance(event, Reasoning):
        return {"reasoning_content": event.text}, None
    if isinstance(event, Content):
        return {"content": event.text}, {"content": list(event.notes), "refusal": None} if body.logprobs else None
    if isinstance(event, CallBegins):
        function = {"name": event.name, "arguments": ""}
        call = {"index": event.index, "id": new_id("call_"), "type": "function", "function": function}
        return {"tool_calls": [call]}, None  # type: ignore[list-item]
    return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}, None


def _chunk_choice(
    index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, finish_reason: FinishReason | None = None
) -> ChatChunkChoice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class _WholeChoice:
    """Collects the events of one answer."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._calls: list[tuple[CallBegins, list[str]]] = []

    def add(self, event: Event[TokenLogprob]) -> None:
        """Take the next event."""
        if isinstance(event, Reasoning):
            self._reasoning.append(event.text)
        elif isinstance(event, Content):
            self._content.append(event.text)
            self._logprobs += event.notes
        elif isinstance(event, CallBegins):
            self._calls.append((event, []))
        else:
            self._calls[-1][1].append(event.text)

    def choice(self, choice: _Choice, body: ChatBody) -> ChatChoice:
        """The finished answer."""
        assert choice.finish_reason is not None
        content = "".join(self._content)
        message: AssistantMessage = {
            "role": "assistant",
            "content": content if content or not self._calls else None,
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [
                {
                    "id": new_id("call_"),
                    "type": "function",
                    "function": {"name": call.name, "arguments": "".join(arguments)},
                }
                for call, arguments in self._calls
            ]
        whole: ChatChoice = {
            "index": self._index,
            "message": message,
            "logprobs": {"content": self._logprobs, "refusal": None} if body.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        if body.return_token_ids:
            whole["token_ids"] = choice.token_ids
        return whole
