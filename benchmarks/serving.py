"""Time to first token and tokens per second of a server under 1, 8 and 32 clients.

    python benchmarks/serving.py runs/quickstart --clients 1 8 32 --requests 64 --prompt_tokens 64 --max_tokens 128

Starts `minnow serve MODEL` on a free port, or measures what runs at --url (any OpenAI-compatible server; name the model
with --model_name). Every client sends one request after another to /v1/completions: a prompt of token ids of its own
(so no prefix cache helps, nor one that remembers an earlier measurement), `ignore_eos`, greedy, streamed. A warm-up
comes first. Prints a table; --json writes it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx


@dataclass
class Timing:
    """One request, in seconds from when it was sent."""

    first: float
    last: float
    tokens: int


@contextlib.contextmanager
def served(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(address, model name) of the server to measure."""
    if arguments.url:
        yield arguments.url.rstrip("/").removesuffix("/v1"), arguments.model_name
        return
    command = [sys.executable, "-m", "minnow", "serve", f"model={arguments.model}", "--port", "0"]
    process = subprocess.Popen([*command, *shlex.split(arguments.serve)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"at (http://\S+)/v1", process.stdout.readline())
        if not found:
            raise SystemExit("the server did not start")
        yield found[1], "model"
    finally:
        process.terminate()
        process.wait()


async def ask(client: httpx.AsyncClient, model: str, prompt: list[int], max_tokens: int) -> Timing:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first = last = 0.0
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit((await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"]:
                last = time.perf_counter() - start
                first = first or last
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return Timing(first, last, tokens)


async def load(url: str, model: str, clients: int, arguments: argparse.Namespace) -> dict[str, float]:
    numbers = random.Random()  # with a seed, the server would find the warm-up's prompts in its cache
    waiting = [
        [numbers.randrange(arguments.first_id, arguments.vocab_size) for _ in range(arguments.prompt_tokens)]
        for _ in range(max(arguments.requests, clients))
    ]
    timings: list[Timing] = []

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=None) as connection:
            while waiting:
                timings.append(await ask(connection, model, waiting.pop(), arguments.max_tokens))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    firsts = sorted(timing.first for timing in timings)
    between = [(timing.last - timing.first) / max(timing.tokens - 1, 1) for timing in timings]
    return {
        "clients": clients,
        "first_token_ms_median": 1000 * statistics.median(firsts),
        "first_token_ms_p95": 1000 * firsts[min(int(0.95 * len(firsts)), len(firsts) - 1)],
        "between_tokens_ms_median": 1000 * statistics.median(between),
        "tokens_per_second": sum(timing.tokens for timing in timings) / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model folder, run folder or Hub id")
    parser.add_argument("--url", help="measure this server instead of starting one")
    parser.add_argument("--model_name", help="the model's name at --url")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64, help="for each number of clients, at least one a client")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--first_id", type=int, default=32, help="prompts hold ids from here (no control tokens) ...")
    parser.add_argument("--vocab_size", type=int, default=1000, help="... to here")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--serve", default="", help="more settings of minnow serve, as one text")
    arguments = parser.parse_args()
    if not arguments.model and not (arguments.url and arguments.model_name):
        parser.error("give a model, or --url and --model_name")
    with served(arguments) as (url, model):
        rows = []
        asyncio.run(load(url, model, 1, argparse.Namespace(**(vars(arguments) | {"requests": 4}))))
        print("| clients | first token, median | 95th percentile | between tokens, median | tokens/s, all clients |")
        print("|---|---|---|---|---|")
        for clients in arguments.clients:
            row = asyncio.run(load(url, model, clients, arguments))
            rows.append(row)
            print(
                f"| {clients} | {row['first_token_ms_median']:.1f} ms | {row['first_token_ms_p95']:.1f} ms "
                f"| {row['between_tokens_ms_median']:.2f} ms | {row['tokens_per_second']:,.0f} |",
                flush=True,
            )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
