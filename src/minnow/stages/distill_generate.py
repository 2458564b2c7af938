"""`minnow distill generate`: a teacher answers prompts; what it says becomes an SFT file, whatever its architecture."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from minnow.config import UserError
from minnow.data.readers import read_rows
from minnow.data.records import RowError, parse_conversation
from minnow.engine.engine import Engine
from minnow.engine.sampling import SamplingParams
from minnow.model.pretrained import load_pretrained, resolve_model_folder
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.chat import Conversation, Message, render
from minnow.tokenizer.special import CHAT_TOKENS
from minnow.training.hardware import DeviceName, choose_device

RETRIES = 5
ENGINE_BATCH = 64


@dataclass(frozen=True)
class Answer:
    """What a teacher said."""

    text: str
    finished: bool
    """Whether it ended by itself, not at max_tokens."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Let a teacher answer the prompts of conversations and keep its answers as conversations to fine-tune on."""

    prompts: tuple[str, ...]
    """Conversations (files, folders, globs, Hub data sets); the teacher gives a new last answer to each."""
    out: str
    """File to write, JSON lines of {"messages"}; what it already answers is not asked again."""
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
    max_tokens: int = 512
    """Longest answer; one that is cut there is not kept."""
    temperature: float = 0.7
    """Of the teacher's sampling; 0: always the likeliest token."""
    must_match: str | None = None
    """Regular expression that a whole answer must match to be kept."""
    max_rows: int | None = None
    """Answer at most this many prompts."""
    seed: int = 0
    """Seed of a teacher that runs here."""
    device: DeviceName = "auto"
    """Where it runs."""
    retry_seconds: float = field(default=2.0)
    """First pause after a failed request; it doubles with each of five tries."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.endpoint is None):
            raise UserError("give one teacher: --model FOLDER or --endpoint URL")
        if self.requests_per_minute <= 0 or self.parallel < 1:
            raise UserError("--requests_per_minute must be positive and --parallel at least 1")


def run(config: Config) -> None:
    """Ask, check and append; stopped and started again, it goes on where it was."""
    console = Console(stderr=True)
    out = Path(config.out)
    answered = _answered(out)
    prompts = [prompt for prompt in _prompts(config) if _key(prompt.messages) not in answered]
    ask = _ask_engine if config.model is not None else _ask_endpoint
    counts: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        for prompt, answer in ask(config, prompts):
            problem = check(answer, config.must_match)
            counts[problem or "kept"] += 1
            if problem is None:
                messages = [*prompt.messages, Message("assistant", answer.text.strip())]
                row = {"messages": [{"role": m.role, "content": m.content} for m in messages]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    shown = ", ".join(f"{count} {what}" for what, count in counts.most_common()) or "nothing left to ask"
    console.print(f"{len(prompts)} prompts: {shown}; {config.out}", highlight=False)


def check(answer: Answer, must_match: str | None = None) -> str | None:
    """Say what is wrong with an answer as something to learn from; None if nothing is."""
    text = answer.text.strip()
    if not text:
        return "empty"
    if not answer.finished:
        return "cut at max_tokens"
    if any(token in text for token in CHAT_TOKENS):
        return "with control tokens"
    if must_match is not None and re.fullmatch(must_match, text, re.DOTALL) is None:
        return "not matching must_match"
    return None


def _prompts(config: Config) -> Iterator[Conversation]:
    """The conversations without their last answer, each prompt once."""
    seen: set[str] = set()
    for location, row in read_rows(config.prompts):
        try:
            conversation = parse_conversation(row)
        except RowError as error:
            raise UserError(f"{location}: {error}") from None
        last = max(i for i, message in enumerate(conversation.messages) if message.role == "user")
        prompt = Conversation(conversation.messages[: last + 1], conversation.tools)
        if _key(prompt.messages) not in seen:
            seen.add(_key(prompt.messages))
            yield prompt
        if len(seen) == config.max_rows:
            return


def _key(messages: Sequence[Message]) -> str:
    """Of what is sent and written: roles and contents."""
    said = [[message.role, message.content] for message in messages]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()


def _answered(out: Path) -> set[str]:
    """Prompts that the file answers; a last line that a kill cut short is taken off."""
    if not out.exists():
        return set()
    whole, keys = 0, set()
    with open(out, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            keys.add(_key(parse_conversation(json.loads(line)).messages[:-1]))
    os.truncate(out, whole)
    return keys


def _ask_engine(config: Config, prompts: list[Conversation]) -> Iterator[tuple[Conversation, Answer]]:
    assert config.model is not None
    folder = resolve_model_folder(config.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.require_chat_tokens()
    engine = Engine(load_pretrained(folder, device=choose_device(config.device)), tokenizer)
    for start in range(0, len(prompts), ENGINE_BATCH):
        group = prompts[start : start + ENGINE_BATCH]
        ids = [render(tokenizer, prompt, add_generation_prompt=True).ids.tolist() for prompt in group]
        sampling = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=config.seed)
        for prompt, result in zip(group, engine.generate(ids, sampling), strict=True):
            completion = result.completions[0]
            yield prompt, Answer(completion.text, completion.finish_reason == "stop")


def _ask_endpoint(config: Config, prompts: list[Conversation]) -> Iterator[tuple[Conversation, Answer]]:
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


def _request(config: Config, prompt: Conversation, limiter: RateLimiter) -> Answer:
    assert config.endpoint is not None
    body: dict[str, Any] = {
        "model": config.endpoint_model,
        "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(config.api_key_variable):
        headers["Authorization"] = f"Bearer {key}"
    address = f"{config.endpoint.rstrip('/')}/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    problem = ""
    for attempt in range(RETRIES):
        limiter.wait()
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                choice = json.load(response)["choices"][0]
            return Answer(choice["message"]["content"] or "", choice["finish_reason"] == "stop")
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.read(500).decode(errors='replace')}"
            if error.code != 429 and error.code < 500:
                break  # asking again would not help
        except (OSError, KeyError, IndexError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        time.sleep(config.retry_seconds * 2**attempt)
    raise UserError(f"{address}: {problem}; what was answered is kept, the same command goes on from there")
