"""minnow in three lines of Python: load a model, talk with it, ask it for probabilities and vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from minnow.config import UserError
from minnow.data.openai_form import nameless_tool, openai_tools
from minnow.data.records import parse_message
from minnow.data.values import RowError
from minnow.engine import Completions, Delta, Engine, SamplingParams
from minnow.engine.hidden import mean_hidden, text_logprobs
from minnow.tokenizer.assistant import AssistantStream, Content, Event, Reasoning
from minnow.tokenizer.chat import Conversation, Message, ToolCall, render
from minnow.tokenizer.pieces import PieceStream
from minnow.tokenizer.tool_calls import CallBegins
from minnow.training.hardware import DeviceName, Precision, choose_device, choose_precision


class TokenLogprob(NamedTuple):
    """One token of a text and how likely the model found it."""

    id: int
    text: str
    logprob: float


def load(
    model: str | Path,
    *,
    device: DeviceName = "auto",
    precision: Precision = "auto",
    adapters: Mapping[str, str | Path] | None = None,
) -> Model:
    """Load MODEL: a model folder, a run folder (its final model) or a Hugging Face Hub id.

    device: cpu, cuda, mps or auto. precision: fp32, bf16, fp16 or auto, which takes bf16 where the hardware is faster
    in it. adapters: by name, folders of adapters beside the model; every method takes `adapter=NAME` then.
    UserError where there is no such model, or one that minnow cannot read.
    """
    where = choose_device(device)
    dtype = choose_precision(precision, where)
    return Model(Engine.from_pretrained(model, dtype=dtype, device=where, frozen=True, adapters=adapters))


class Model:
    """A loaded model. `options` are the fields of `SamplingParams`: temperature, top_p, max_tokens, seed, stop ..."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.tokenizer = engine.tokenizer

    @overload
    def chat(
        self, messages: str | Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Any
    ) -> Message: ...

    @overload
    def chat(
        self, messages: str | Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Any
    ) -> Iterator[str]: ...

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> Message | Iterator[str]:
        """Answer a conversation: {"role": ..., "content": ...} each, or a text as the user's only message.

        A user's content may be a list of parts, {"type": "text", "text": ...} and, for a model that looks at pictures,
        {"type": "image", "image": X}: X is a path, a file's bytes or a `data:` URL.
        The answer is a `Message` with content, reasoning_content and tool_calls; with `stream`, the pieces of its
        content alone as they come, without thoughts and calls. What looks like a call and is none is content, and
        comes once that is known. thinking: let the model reason first. tools: JSON schemas of functions it may call.
        UserError for a message that is none, a grammar with thinking, which it would bind too, control tokens in the
        text, a tool without a name, and for pictures that cannot be read or that a model which only reads is shown.
        """
        items = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        if not items:
            raise UserError("no messages to answer")
        if (number := nameless_tool(tools)) is not None:
            raise UserError(f"tool {number} of `tools` has no `name`: the model could not call it")
        try:
            read = tuple(parse_message(item, number) for number, item in enumerate(items, 1))
        except RowError as error:
            raise UserError(str(error)) from error
        conversation = Conversation(read, tools=tuple(openai_tools(tools)))
        params = _one_answer(options)
        if thinking and params.grammar is not None:
            raise UserError(
                "with thinking the grammar would begin in the thoughts, and no answer follow: leave out one of the two"
            )
        if not params.skip_special_tokens:
            raise UserError(
                "skip_special_tokens=False: a message holds no control tokens; `engine.generate` gives text with them"
            )
        rendered = render(self.tokenizer, conversation, add_generation_prompt=True, enable_thinking=thinking)
        events = self._events(self.engine.stream(rendered, params), thinking)
        if stream:
            return (event.text for event in events if isinstance(event, Content))
        return _message(events)

    def _events(self, deltas: Iterator[Delta], thinking: bool) -> Iterator[Event[None]]:
        """An answer taken apart as the server takes it apart."""
        pieces: PieceStream[None] = PieceStream(self.tokenizer)
        assistant: AssistantStream[None] = AssistantStream(thinking=thinking, tools=True, whole_calls=True)
        for delta in deltas:
            for piece in pieces.push([delta.id], [None], delta.text):
                yield from assistant.push(piece)
        yield from assistant.finish()

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **options: Any) -> str: ...

    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **options: Any) -> Iterator[str]: ...

    @overload
    def generate(self, prompt: Sequence[str], *, stream: Literal[False] = False, **options: Any) -> list[str]: ...

    def generate(
        self, prompt: str | Sequence[str], *, stream: bool = False, **options: Any
    ) -> str | list[str] | Iterator[str]:
        """Continue a text as a document's beginning, or several at once; `stream` gives the pieces of one as they come.

        `engine.generate` gives ids, several samples and log-probabilities too.
        """
        params = _one_answer(options)
        if stream:
            if not isinstance(prompt, str):
                raise UserError("stream=True continues one text, not several")
            return (delta.text for delta in self.engine.stream(prompt, params) if delta.text)
        outputs: list[Completions] = self.engine.generate([prompt] if isinstance(prompt, str) else prompt, params)
        texts = [output.completions[0].text for output in outputs]
        return texts[0] if isinstance(prompt, str) else texts

    def logprobs(self, text: str, *, prompt: str = "", adapter: str | None = None) -> list[TokenLogprob]:
        """Natural log of each token's probability, given `prompt` and the tokens before it.

        The text stands at a document's beginning, as in pretraining; a prompt's own tokens are not listed.
        """
        before, ids = self.engine.prompt_ids(prompt), self.tokenizer.encode(text)
        if not ids:
            return []
        with self.engine.adapters.through(adapter, len(before) + len(ids)):
            logprobs = text_logprobs(self.engine.model, [*before, *ids])[len(before) - 1 :].tolist()
        return [TokenLogprob(i, self.tokenizer.decode([i]), value) for i, value in zip(ids, logprobs, strict=True)]

    def embed(self, texts: str | Sequence[str], *, adapter: str | None = None) -> Tensor:
        """Unit vectors fp32, [D] for a text or [N, D] for several: the mean of the final hidden states.

        A language model is not trained for this: the vectors of a small one tell topics apart and little more.
        """
        each = [texts] if isinstance(texts, str) else texts
        # One by one: texts of any number need no more memory than the longest.
        none = [torch.empty(0, self.engine.model.config.hidden_size)]  # cat wants one at least
        vectors_ND = torch.cat(none + [self._embed(self.engine.prompt_ids(text), adapter) for text in each])
        return vectors_ND[0] if isinstance(texts, str) else vectors_ND

    def _embed(self, ids: list[int], adapter: str | None) -> Tensor:
        with self.engine.adapters.through(adapter, len(ids)):
            return mean_hidden(self.engine.model, [ids])


def _one_answer(options: Mapping[str, Any]) -> SamplingParams:
    """The options of a method that gives one answer; UserError where several are asked for."""
    params = SamplingParams(**options)
    if params.n > 1:
        raise UserError(f"n is {params.n}, but this gives one answer: take `engine.generate` for several")
    return params


def _message(events: Iterator[Event[None]]) -> Message:
    """A whole answer: its events, folded. A call's arguments come in one piece, see `AssistantStream`."""
    content, reasoning = "", ""
    calls: list[ToolCall] = []
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, Reasoning):
            reasoning += event.text
        elif isinstance(event, CallBegins):
            calls.append(ToolCall(event.name, {}))
        else:
            calls[-1] = ToolCall(calls[-1].name, json.loads(event.text))
    return Message("assistant", content, reasoning or None, tuple(calls))
