"""Asking many environments at once: whoever takes too long loses its episode, whoever breaks is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from minnow.config import UserError
from minnow.data.prompts import Prompt
from minnow.rl.environment import Environment, Reply
from minnow.rl.timed_calls import run_all, where
from minnow.tokenizer.chat import Conversation, Message

T = TypeVar("T")


def make(maker: Callable[[Prompt], Environment], prompt: Prompt, *, seconds: float) -> Environment:
    """The episode of a prompt. UserError where making it fails, or takes more than `seconds`."""
    (made,) = run_all([lambda: maker(prompt)], seconds=seconds, threads=1)
    if isinstance(made, TimeoutError):
        raise UserError(
            f"the environment for the prompt {shown(prompt)}: making it took more than rollout.environment_seconds "
            f"({seconds:g}). What is slow belongs into its reset, which may fail without ending the run"
        )
    return _sound(made, prompt, "the environment", "could not be made")


def reset_all(environments: Sequence[Environment], *, seconds: float, threads: int) -> list[Conversation | None]:
    """Every episode's opening, in order; None where there was none after `seconds`.

    UserError where one raises anything but TimeoutError, or returns no conversation.
    """
    outcomes = run_all([environment.reset for environment in environments], seconds=seconds, threads=threads)
    openings: list[Conversation | None] = []
    for environment, outcome in zip(environments, outcomes, strict=True):
        if isinstance(outcome, TimeoutError):
            openings.append(None)
            continue
        opening = _sound(outcome, environment.prompt, _name(environment), "failed in reset")
        if not isinstance(opening, Conversation):
            raise _wrong(environment, f"reset returned {type(opening).__name__}, not a Conversation")
        openings.append(opening)
    return openings


def step_all(
    environments: Sequence[Environment], answers: Sequence[Message], *, seconds: float, threads: int
) -> list[Reply | None]:
    """Every environment's reply to its answer, in order; None where there was none after `seconds`.

    UserError where one raises anything but TimeoutError, or returns no reply that an episode could go on with.
    """
    pairs = zip(environments, answers, strict=True)
    calls = [partial(environment.step, answer) for environment, answer in pairs]
    replies: list[Reply | None] = []
    for environment, outcome in zip(environments, run_all(calls, seconds=seconds, threads=threads), strict=True):
        if isinstance(outcome, TimeoutError):
            replies.append(None)
            continue
        reply = _sound(outcome, environment.prompt, _name(environment), "failed in step")
        if not isinstance(reply, Reply):
            raise _wrong(environment, f"step returned {type(reply).__name__}, not a Reply")
        if not isinstance(reply.reward, int | float) or not math.isfinite(reply.reward):
            raise _wrong(environment, f"step gave the reward {reply.reward!r}: it must be a finite number")
        if not reply.done and not reply.messages:
            raise _wrong(environment, "step replied without a message and without `done`: say one of them")
        replies.append(reply)
    return replies


def shown(prompt: Prompt) -> str:
    """The beginning of what is asked, for a person to find the row by."""
    return repr(prompt.conversation.messages[-1].content[:60])


def _sound(outcome: T | BaseException, prompt: Prompt, who: str, what: str) -> T:
    """The outcome, unless it is an exception."""
    if isinstance(outcome, UserError):
        raise outcome
    if isinstance(outcome, BaseException):
        raise UserError(f"{who} {what} for the prompt {shown(prompt)}: {where(outcome)}") from outcome
    return outcome


def _wrong(environment: Environment, what: str) -> UserError:
    return UserError(f"{_name(environment)}: {what} (the prompt is {shown(environment.prompt)})")


def _name(environment: Environment) -> str:
    return f"the environment {type(environment).__name__}"
