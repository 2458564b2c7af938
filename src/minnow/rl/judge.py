"""A language model as judge, behind any OpenAI-compatible endpoint (ours, vLLM, llama.cpp, a service)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from minnow.config import UserError
from minnow.rl.http import post_json
from minnow.rl.rollouts import Trajectory

_INSTRUCTION = (
    "Judge the answer to the question. Give one whole number from 0 (useless or wrong) to 10 (right, clear and "
    "complete), and nothing else."
)
_SCORE = re.compile(r"\d+(?:\.\d+)?")


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


def _ask(config: JudgeConfig, body: dict[str, Any]) -> str:
    url = f"{str(config.url).rstrip('/')}/chat/completions"
    reply = post_json(url, body, key=os.environ.get("MINNOW_JUDGE_KEY", ""), seconds=config.seconds)
    try:
        return str(reply["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise UserError(f"the judge at {url} replied without an answer") from None
