"""A teacher that speaks next in conversations: a model that runs here, or one behind an OpenAI-compatible server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from minnow.config import UserError
from minnow.data.openai_form import openai_messages, openai_tools
from minnow.data.records import parse_message
from minnow.data.values import RowError
from minnow.engine.engine import Engine
from minnow.engine.sampling import SamplingParams
from minnow.http import post_json
from minnow.model.pretrained import load_pretrained, resolve_model_folder
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.chat import Conversation, Message, render
from minnow.tokenizer.parse import parse_assistant_ids
from minnow.training.hardware import DeviceName, choose_device

RETRIES = 5
ENGINE_BATCH = 64


@dataclass(frozen=True)
class Answer:
    """What a teacher said."""

    message: Message | None
    """Without white space around its parts; None: what came cannot be read as a message."""
    ending: str
    """`stop` or `tool_calls`: it ended by itself; `length`: at max_tokens; `context`: the prompt left no room; or
    another word of the server's."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who the teacher is, and how it is asked."""

    model: str | None = None
    """Teacher that runs here: a model folder, a run folder or a Hub id."""
    endpoint: str | None = None
    """Teacher behind an OpenAI-compatible server: its base address, such as http://localhost:8000/v1."""
    endpoint_model: str = "default"
    """Name of the model at the endpoint."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key, if it wants one."""
    requests_per_minute: float = 60.0
    """The endpoint is not asked more often than this."""
    parallel: int = 4
    """Requests under way at a time."""
    retry_seconds: float = 2.0
    """First pause after a failed request; it doubles with each of five tries."""
    enable_thinking: bool | None = None
    """Let the teacher think before it answers; an endpoint is told so in `chat_template_kwargs`. null: a teacher that
    runs here does not think, an endpoint does what it does by default."""
    max_tokens: int = 512
    """Longest answer, thoughts included; one that is cut there is not kept."""
    temperature: float = 0.7
    """Of the teacher's sampling; 0: always the likeliest token."""
    seed: int = 0
    """Seed of a teacher that runs here."""
    device: DeviceName = "auto"
    """Where it runs."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.endpoint is None):
            raise UserError("give one teacher: --model FOLDER or --endpoint URL")
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise UserError(f"--endpoint {self.endpoint}: an address begins with http:// or https://")
        if not self.requests_per_minute > 0 or self.parallel < 1:
            raise UserError("--requests_per_minute must be positive and --parallel at least 1")
        if not self.retry_seconds >= 0:
            raise UserError(f"--retry_seconds is {self.retry_seconds}, but must be 0 or more")
        _ = self.sampling  # refuses what cannot be sampled with, for an endpoint too

    @property
    def sampling(self) -> SamplingParams:
        """As the engine takes it. UserError for a number that makes no sense."""
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, seed=self.seed)


def ask(config: TeacherConfig, prompts: list[Conversation]) -> Iterator[tuple[Conversation, Answer]]:
    """Each prompt with the teacher's answer, in the order in which they come. UserError when it cannot be asked."""
    return _ask_engine(config, prompts) if config.model is not None else _ask_endpoint(config, prompts)


def _ask_engine(config: TeacherConfig, prompts: list[Conversation]) -> Iterator[tuple[Conversation, Answer]]:
    assert config.model is not None
    folder = resolve_model_folder(config.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.require_chat_tokens()
    if (foreign := tokenizer.foreign_template) is not None:
        raise UserError(f"--model {config.model} came with {foreign}: run it on a server, and give its --endpoint")
    engine = Engine(load_pretrained(folder, device=choose_device(config.device)), tokenizer)
    context, thinking = engine.model.config.max_position_embeddings, bool(config.enable_thinking)
    for start in range(0, len(prompts), ENGINE_BATCH):
        group = prompts[start : start + ENGINE_BATCH]
        ids = [
            render(tokenizer, prompt, add_generation_prompt=True, enable_thinking=thinking).ids.tolist()
            for prompt in group
        ]
        fitting = [i for i, prompt_ids in enumerate(ids) if len(prompt_ids) < context]
        yield from ((prompt, Answer(None, "context")) for i, prompt in enumerate(group) if i not in fitting)
        results = engine.generate([ids[i] for i in fitting], config.sampling)
        for prompt, result in zip([group[i] for i in fitting], results, strict=True):
            completion = result.completions[0]
            message = parse_assistant_ids(tokenizer, completion.ids, thinking=thinking)
            yield prompt, Answer(_tidy(message), completion.finish_reason)


def _ask_endpoint(config: TeacherConfig, prompts: list[Conversation]) -> Iterator[tuple[Conversation, Answer]]:
    """Answers as they come in; never more than `parallel` requests under way, started no faster than the limit."""
    limiter = RateLimiter(config.requests_per_minute)
    waiting = iter(prompts)
    with ThreadPoolExecutor(config.parallel) as threads:
        pending: dict[Future[Answer], Conversation] = {}
        while True:
            while len(pending) < config.parallel and (prompt := next(waiting, None)) is not None:
                pending[threads.submit(_request, config, prompt, limiter)] = prompt
            if not pending:
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield pending.pop(future), future.result()


class RateLimiter:
    """Lets requests start evenly, `per_minute` of them, whichever thread asks."""

    def __init__(
        self,
        per_minute: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.pause, self.clock, self.sleep = 60.0 / per_minute, clock, sleep
        self._next, self._lock = clock(), threading.Lock()

    def wait(self) -> None:
        """Return when the next request may start."""
        with self._lock:
            now = self.clock()
            start = max(now, self._next)
            self._next = start + self.pause
        if start > now:
            self.sleep(start - now)


def _request(config: TeacherConfig, prompt: Conversation, limiter: RateLimiter) -> Answer:
    assert config.endpoint is not None
    try:
        return post_json(
            f"{config.endpoint.rstrip('/')}/chat/completions",
            _body(config, prompt),
            lambda reply: _answer(reply["choices"][0]),
            key=os.environ.get(config.api_key_variable),
            seconds=600,
            attempts=RETRIES,
            pause=config.retry_seconds,
            before=limiter.wait,
        )
    except UserError as error:
        raise UserError(f"{error}; what was answered is kept, the same command goes on from there") from None


def _body(config: TeacherConfig, prompt: Conversation) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": config.endpoint_model,
        "messages": openai_messages(prompt.messages, arguments_as_text=True),
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
    }
    if prompt.tools:
        body["tools"] = openai_tools(prompt.tools)
    if config.enable_thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": config.enable_thinking}
    return body


def _answer(choice: dict[str, Any]) -> Answer:
    """A choice of the server's. Read as rows are, so that what is written is read as the same message."""
    said = choice["message"]
    item = {
        "role": "assistant",
        "content": said.get("content") or "",
        "reasoning_content": said.get("reasoning_content") or said.get("reasoning"),  # newer vLLM's word
        "tool_calls": said.get("tool_calls"),
    }
    try:
        message = _tidy(parse_message(item, 1))
    except RowError:
        message = None
    return Answer(message, choice["finish_reason"])


def _tidy(message: Message) -> Message:
    thoughts = (message.reasoning_content or "").strip()
    return replace(message, content=message.content.strip(), reasoning_content=thoughts or None)
