"""What the stages share whose model writes what it learns from: prompts, episodes, and rows for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minnow.config import UserError
from minnow.data.prompts import Prompt, read_prompts
from minnow.model.config import ModelConfig
from minnow.model.size import training_flops_per_token
from minnow.rl.environment import Environment
from minnow.rl.environment_calls import reset_all
from minnow.rl.environments import environment_maker
from minnow.rl.phase_rollouts import MakeEnvironment
from minnow.rl.rollouts import RolloutConfig
from minnow.stages.rows import RowsConfig
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.chat import Conversation, render
from minnow.training.config import TrainingConfig
from minnow.training.distribution import from_first

CHECKED_AT_ONCE = 64
"""Prompts whose environments are made and opened together before a run."""


@dataclass(frozen=True, kw_only=True)
class PracticeConfig(RowsConfig):
    """What a model practises on, and how."""

    prompts: tuple[str, ...]
    """Files with what to practise on: prompt or question and answer, or conversations (see docs/rl.md)."""
    held_out: tuple[str, ...] = ()
    """Files of the same kind that are only asked at validations."""
    environment: str = "question"
    """question: one answer. Over several turns (rollout.max_turns): calculator, look_up (in a pond), python (in a
    closed room), guess (a game), or MODULE:CLASS of yours, called with the prompt (see docs/rl.md)."""
    pond: str | None = None
    """Folder of the world that the environment look_up knows."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How answers are drawn."""


@dataclass(frozen=True)
class Practice:
    """What a `PracticeConfig` names."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    make_environment: MakeEnvironment


def read_practice(config: PracticeConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> Practice:
    """Read the prompts, without those that do not fit a row with their answer; `say` is told how many these are, how
    many describe tools that nobody has, and how many are reasoned about if not all are.

    A prompt is never cut, and no episode dropped later. UserError where none fits.
    """
    make_environment = environment_maker(
        config.environment, pond=config.pond, seconds=config.rollout.environment_seconds
    )
    if config.environment != "question" and config.rollout.max_turns < 2:
        raise UserError(f"environment {config.environment} replies to the model: give rollout.max_turns of at least 2")
    if config.environment == "question" and config.rollout.max_turns > 1:
        raise UserError(
            f"rollout.max_turns is {config.rollout.max_turns}, but environment question is over after one answer: name "
            "an environment that replies, or leave it out"
        )
    fitting = {
        name: _fitting(config, tokenizer, make_environment, name, read_prompts(paths), say) if paths else []
        for name, paths in (("prompts", config.prompts), ("held_out", config.held_out))
    }
    for name, prompts in fitting.items():
        _tell(config, name, prompts, say)
    return Practice(fitting["prompts"], fitting["held_out"], make_environment)


def practice_rows(training: TrainingConfig, sequence_length: int) -> int:
    """Rows of a micro-batch. UserError for settings of the loop under which a model cannot write while it trains."""
    tokens = training.micro_batch_tokens
    if tokens == "auto":
        raise UserError("training shares the memory with the engine: give training.micro_batch_tokens as a number")
    if tokens < sequence_length:
        raise UserError(
            f"training.micro_batch_tokens is {tokens}: it must hold a row of sequence_length {sequence_length}"
        )
    return tokens // sequence_length


def practice_flops(rollout: RolloutConfig, answers: int, shape: ModelConfig) -> float:
    """Of the updates on so many answers, each at half its longest."""
    tokens = answers * rollout.max_tokens * rollout.max_turns / 2
    return tokens * training_flops_per_token(shape, rollout.max_tokens / 2)


def longest_batch(rollout: RolloutConfig, parts: int = 1) -> int:
    """Tokens of an update that learns from one of `parts` of a phase's answers, each at its longest.

    How long answers really are is not known before the run: optim.reference_batch_tokens counts these.
    """
    return max(1, rollout.prompts * rollout.samples * rollout.max_tokens * rollout.max_turns // parts)


def _tell(config: PracticeConfig, name: str, prompts: Sequence[Prompt], say: Callable[[str], None]) -> None:
    """Say what the prompts are asked for, where that is not the same for all."""
    tools = sum(bool(prompt.conversation.tools) for prompt in prompts)
    if tools and config.environment == "question":
        say(
            f"{tools:,} of {len(prompts):,} {name} describe tools, which environment question does not have: an answer "
            "that calls one is over with its call"
        )
    if prompts and config.rollout.thinking_share < 1:
        thinking = sum(map(config.rollout.thinks, prompts))
        say(f"{thinking:,} of {len(prompts):,} {name} are reasoned about, the others answered at once")


def _fitting(
    config: PracticeConfig,
    tokenizer: Tokenizer,
    make_environment: MakeEnvironment,
    name: str,
    prompts: Sequence[Prompt],
    say: Callable[[str], None],
) -> list[Prompt]:
    """The prompts that leave room for `rollout.max_tokens` in a row."""
    room = config.row_length - config.rollout.max_tokens
    places: list[int] = []
    longest, shown = 0, ""
    for first in range(0, len(prompts), CHECKED_AT_ONCE):
        part = [make_environment(prompt) for prompt in prompts[first : first + CHECKED_AT_ONCE]]
        for place, opening in enumerate(_openings(config, part, all_may_fail=first > 0), first):
            # An environment that did not open in time may do so when it is played.
            length = 0 if opening is None else len(render(tokenizer, opening, add_generation_prompt=True).ids)
            if length <= room:
                places.append(place)
            elif length > longest and opening is not None:
                longest, shown = length, opening.messages[-1].content[:60]
    # Where openings differ from one reset to the next, all processes still must practise on the same prompts.
    fitting = [prompts[place] for place in from_first(places)]
    if len(fitting) < len(prompts):
        why = (
            f"beside an answer of rollout.max_tokens {config.rollout.max_tokens}, sequence_length "
            f"{config.row_length} has room for prompts of {max(room, 0)} tokens; the longest, "
            f"{shown!r}, has {longest}"
        )
        if not fitting:
            raise UserError(
                f"no prompt of the {name} is short enough: {why}. Raise sequence_length, or shorten prompts or answers"
            )
        say(f"{len(prompts) - len(fitting):,} of {len(prompts):,} {name} are too long and left out: {why}")
    return fitting


def _openings(
    config: PracticeConfig, environments: Sequence[Environment], *, all_may_fail: bool
) -> list[Conversation | None]:
    """What each environment begins with; None for one that took too long. UserError where all did, unless they may."""
    seconds, threads = config.rollout.environment_seconds, config.rollout.environment_threads
    openings = reset_all(environments, seconds=seconds, threads=threads)
    if not any(openings) and not all_may_fail:
        raise UserError(
            f"environment {config.environment}: none of {len(openings)} was reset within rollout.environment_seconds "
            f"({seconds:g}). Look into what hangs, or raise it"
        )
    return openings
