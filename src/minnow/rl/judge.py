"""A language model as judge, behind any OpenAI-compatible endpoint (ours, vLLM, llama.cpp, a service)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from minnow.config import UserError, refuse_unused
from minnow.http import ATTEMPTS, post_json
from minnow.rl.environment_calls import shown
from minnow.rl.rollouts import Trajectory
from minnow.rl.timed_calls import check_seconds, run_all, where

_log = logging.getLogger(__name__)

_INSTRUCTION = (
    "Judge the answer to the question. Give one whole number from 0 (useless or wrong) to 10 (right, clear and "
    "complete), and nothing else."
)
_MARK = re.compile(r"[^\d-]*(\d+(?:\.\d+)?)(?:[\s*_]*(?:/|out of)[\s*_]*10)?\D*")
"""One number and no other, but for what it is out of: "Marks from 0 to 10: 7" could mean anything."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A model that reads question and answer and gives a mark."""

    url: str | None = None
    """Base address, such as http://127.0.0.1:8000/v1; null: no judge. A key is read from MINNOW_JUDGE_KEY."""
    model: str = "judge"
    """The judge's name at that address."""
    weight: float = 1.0
    """Weight of the mark, which is scaled to 0 to 1; with 0 nobody is asked."""
    instruction: str = _INSTRUCTION
    """What the judge is told; it must ask for a number from 0 to 10."""
    parallel: int = 8
    """Requests under way at once."""
    seconds: float = 60.0
    """Longest wait for one reply; a busy or broken server is asked four times."""

    def __post_init__(self) -> None:
        if self.parallel < 1:
            raise UserError(f"rewards.judge.parallel is {self.parallel}: it must be at least 1")
        check_seconds("rewards.judge.seconds", self.seconds)
        if self.url is None:
            others = ("model", "weight", "instruction")
            refuse_unused(self, dict.fromkeys(others, "rewards.judge.url is null"), "rewards.judge.")


def judge_reward(config: JudgeConfig, trajectories: Sequence[Trajectory]) -> list[float]:
    """A mark from 0 to 1 for each. UserError when the judge cannot be reached.

    An answer that the judge gives no number for is marked as left out; what stands for it here means nothing. (It would
    say the same again, at temperature 0, so that a run that stopped there could not go on.)
    """
    calls = [partial(_reply, config, trajectory) for trajectory in trajectories]
    replies = run_all(calls, seconds=ATTEMPTS * config.seconds + 60, threads=config.parallel)
    return [_read(config, *pair) for pair in zip(trajectories, replies, strict=True)]


def _read(config: JudgeConfig, trajectory: Trajectory, reply: str | BaseException) -> float:
    """The mark in a reply, from 0 to 1."""
    if isinstance(reply, BaseException):
        if isinstance(reply, UserError):
            raise reply
        raise UserError(f"the judge {config.model} at {config.url} failed: {where(reply)}") from reply
    found = _MARK.fullmatch(reply)
    if found is not None and float(found[1]) <= 10:
        return float(found[1]) / 10
    _log.warning(
        "an answer was left out: the judge %s gave no number from 0 to 10 but %r, for the prompt %s",
        config.model, reply[:80], shown(trajectory.environment.prompt),
    )  # fmt: skip
    trajectory.left_out = "judge"
    return 0.0


def _reply(config: JudgeConfig, trajectory: Trajectory) -> str:
    question = "\n\n".join(m.content for m in trajectory.environment.prompt.conversation.messages if m.role == "user")
    text = f"Question:\n{question}\n\nAnswer:\n{trajectory.answer.content}"
    reference = trajectory.environment.prompt.reference
    if reference is not None:
        text += f"\n\nA right answer, to compare with:\n{reference}"
    messages = [{"role": "system", "content": config.instruction}, {"role": "user", "content": text}]
    body = {"model": config.model, "messages": messages, "temperature": 0, "max_tokens": 16}
    url = f"{str(config.url).rstrip('/')}/chat/completions"
    key = os.environ.get("MINNOW_JUDGE_KEY")
    return post_json(url, body, _content, key=key, seconds=config.seconds)


def _content(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"] or "")
