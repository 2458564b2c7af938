"""What the stages share whose model writes what it learns from: prompts, episodes, and rows for them."""

from __future__ import annotations

from dataclasses import dataclass, field

from minnow.config import UserError
from minnow.data.prompts import Prompt, read_prompts
from minnow.model.size import training_flops_per_token
from minnow.model.transformer import CausalLM
from minnow.rl.environment import Environment
from minnow.rl.environments import environment_maker
from minnow.rl.phase_rollouts import MakeEnvironment
from minnow.rl.rollouts import RolloutConfig
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.chat import render
from minnow.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class PracticeConfig:
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
    sequence_length: int = 1024
    """Positions of a packed row; no episode is longer."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How answers are drawn."""


@dataclass(frozen=True)
class Practice:
    """What a `PracticeConfig` names."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    make_environment: MakeEnvironment


def read_practice(config: PracticeConfig, tokenizer: Tokenizer) -> Practice:
    """Read the prompts. UserError where one of them, with an answer, does not fit a row."""
    prompts, held_out = read_prompts(config.prompts), read_prompts(config.held_out) if config.held_out else []
    make_environment = environment_maker(config.environment, pond=config.pond)
    if config.environment != "question" and config.rollout.max_turns < 2:
        raise UserError(f"environment {config.environment} replies to the model: give rollout.max_turns of at least 2")
    for prompt in (*prompts, *held_out):
        _check_room(config, tokenizer, make_environment(prompt))
    return Practice(prompts, held_out, make_environment)


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


def practice_flops(rollout: RolloutConfig, answers: int, model: CausalLM) -> float:
    """Of the updates on so many answers, each at half its longest."""
    tokens = answers * rollout.max_tokens * rollout.max_turns / 2
    return tokens * training_flops_per_token(model.config, rollout.max_tokens / 2)


def _check_room(config: PracticeConfig, tokenizer: Tokenizer, environment: Environment) -> None:
    """UserError where a prompt and its first answer might not fit a row: an episode is never cut or dropped later."""
    conversation = environment.reset()
    length = len(render(tokenizer, conversation, add_generation_prompt=True).ids)
    if length + config.rollout.max_tokens > config.sequence_length:
        shown = conversation.messages[-1].content[:60]
        raise UserError(
            f"the prompt {shown!r} has {length} tokens; with an answer of rollout.max_tokens "
            f"{config.rollout.max_tokens} it does not fit sequence_length {config.sequence_length}: "
            "raise it, or shorten the prompt or the answer"
        )
