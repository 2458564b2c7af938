"""A language model as judge, behind any OpenAI-compatible endpoint (ours, vLLM, llama.cpp, a service)."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from minnow.config import UserError
from minnow.rl.rollouts import Trajectory

_INSTRUCTION = (
    "Judge the answer to the question. Give one whole number from 0 (useless or wrong) to 10 (right, clear and "
    "complete), and nothing else."
)
_SCORE = re.compile(r"\d+(?:\.\d+)?")
_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A model that reads question and answer and gives a mark."""

    url: str | None = None
    """Base address, such as http://127.0.0.1:8000/v1; null: no judge. A key is read from MINNOW_JUDGE_KEY."""
    model: str = "judge"
    """The judge's name at that address."""
    weight: float = 1.0
    """Weight of the mark, which is scaled to 0 to 1."""
    instruction: str = _INSTRUCTION
    """What the judge is told; it must ask for a number from 0 to 10."""
    parallel: int = 8
    """Requests under way at once."""
    seconds: float = 60.0
    """Longest wait for one mark."""


def judge_reward(config: JudgeConfig, trajectories: Sequence[Trajectory]) -> list[float]:
    """A mark from 0 to 1, times the weight, for each. UserError when the judge cannot be reached or gives no number."""
    with ThreadPoolExecutor(config.parallel) as pool:
        return [config.weight * mark for mark in pool.map(lambda item: _mark(config, item), trajectories)]


def _mark(config: JudgeConfig, trajectory: Trajectory) -> float:
    question = "\n\n".join(m.content for m in trajectory.environment.prompt.conversation.messages if m.role == "user")
    text = f"Question:\n{question}\n\nAnswer:\n{trajectory.answer.content}"
    reference = trajectory.environment.prompt.reference
    if reference is not None:
        text += f"\n\nA right answer, to compare with:\n{reference}"
    messages = [{"role": "system", "content": config.instruction}, {"role": "user", "content": text}]
    reply = _ask(config, {"model": config.model, "messages": messages, "temperature": 0, "max_tokens": 16})
    found = _SCORE.search(reply)
    if found is None or not 0 <= float(found[0]) <= 10:
        raise UserError(f"the judge {config.model} gave no number from 0 to 10 but {reply[:80]!r}")
    return float(found[0]) / 10


def _ask(config: JudgeConfig, body: dict) -> str:
    """The reply's text; busy or broken servers are asked again, with a growing pause."""
    request = urllib.request.Request(
        f"{str(config.url).rstrip('/')}/chat/completions",
        data=json.dumps(body).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('MINNOW_JUDGE_KEY', '')}",
        },
    )
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(0.5 * 2**attempt)
        try:
            with urllib.request.urlopen(request, timeout=config.seconds) as response:
                content: str = json.load(response)["choices"][0]["message"]["content"] or ""
                return content
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {error.read(200).decode('utf-8', 'replace')}"
            if error.code < 500 and error.code != 429:
                break
        except (OSError, KeyError, IndexError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
    raise UserError(f"the judge at {config.url} could not be asked ({problem})")
