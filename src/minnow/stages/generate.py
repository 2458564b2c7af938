"""`minnow generate`: continue a text with a base model."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from minnow.config import UserError
from minnow.console import plain_console, printable
from minnow.disk import atomic_write
from minnow.engine import Engine, SamplingParams
from minnow.json_file import json_text
from minnow.stages.terminal import TalkingConfig


@dataclass(frozen=True, kw_only=True)
class Config(TalkingConfig):
    """Continue a text. The prompt is read as the start of a document, as in pretraining."""

    prompt: str | None = None
    """Text to continue; by default it is read from standard input."""
    n: int = 1
    """Continuations to sample."""
    stop: tuple[str, ...] = ()
    """Strings that end a continuation."""
    ignore_eos: bool = False
    """Go on after the end of the document."""
    json: str | None = None
    """File for prompt, continuations and speed as JSON."""


def run(config: Config) -> None:
    """Print the prompt with its continuation as it comes, or several continuations one after another."""
    params = config.sampling_params(n=config.n, stop=config.stop, ignore_eos=config.ignore_eos)
    if config.prompt is None and sys.stdin.isatty():
        raise UserError('no text to continue: give --prompt "Once upon a time", or pipe one in')
    prompt = sys.stdin.read() if config.prompt is None else config.prompt
    engine = config.load_engine()
    result = _continue(engine, prompt, params, plain_console())
    notes = plain_console(stderr=True)
    notes.print(f"{result['tokens']} tokens, {result['tokens_per_second']:.0f} tokens/s", style="dim")
    if config.json is not None:
        with atomic_write(config.json) as path:
            path.write_text(json_text({"model": config.model, **result}, indent=2) + "\n", encoding="utf-8")


def _continue(engine: Engine, prompt: str, params: SamplingParams, console: Console) -> dict[str, Any]:
    """Generate and print; returns what the JSON file says."""
    texts: list[list[str]] = [[] for _ in range(params.n)]
    ids: list[list[int]] = [[] for _ in range(params.n)]
    reasons: list[str | None] = [None] * params.n

    def show(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style), end="", soft_wrap=True)

    start = time.perf_counter()
    if params.n == 1:
        show(prompt, "dim")
    for delta in engine.stream(prompt, params):
        texts[delta.index].append(delta.text)
        ids[delta.index].append(delta.id)
        reasons[delta.index] = delta.finish_reason
        if params.n == 1:
            show(delta.text)
    seconds = time.perf_counter() - start
    if params.n > 1:  # several grow side by side, so they are shown whole
        for number, text in enumerate(texts, 1):
            console.rule(f"{number} of {params.n}")
            show(prompt, "dim")
            show("".join(text))
            console.print()
    else:
        console.print()
    tokens = sum(map(len, ids))
    return {
        "prompt": prompt,
        "completions": [
            {"text": "".join(text), "ids": tokens_, "finish_reason": reason}
            for text, tokens_, reason in zip(texts, ids, reasons, strict=True)
        ],
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }
