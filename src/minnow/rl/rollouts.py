"""Rollouts: episodes played by the live model, in tokens from beginning to end."""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from minnow.config import UserError, refuse_unused
from minnow.data.prompts import Prompt
from minnow.engine import Completion, Completions, Engine, SamplingParams
from minnow.model.transformer import CausalLM
from minnow.rl.environment import Environment, Reply
from minnow.rl.environment_calls import reset_all, shown, step_all
from minnow.rl.timed_calls import check_seconds
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.chat import Conversation, Message, render, render_continuation
from minnow.tokenizer.parse import parse_assistant_ids

_log = logging.getLogger(__name__)

Ending = Literal["stop", "length", "turns", "timeout"]
"""stop: the model ended its turn and the environment was done; length: cut off; turns: no turn was left; timeout: the
environment took too long."""
LeftOut = Literal["environment", "answer", "judge"]
"""What failed: the environment or the comparison of the answer met its time limit, or the judge gave no mark."""


class RolloutEngine(Protocol):
    """What plays: the Engine around the live model, or a server."""

    model: CausalLM
    tokenizer: Tokenizer

    def generate(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Completions]:
        """Continue every prompt, with log-probabilities of the distribution that was sampled."""
        ...

    def weights_updated(self) -> None:
        """The model has changed."""
        ...


def live_engine(model: CausalLM, tokenizer: Tokenizer) -> Engine:
    """The engine around the module that is trained; on a CPU compiled where that is (a GPU records its steps)."""
    return Engine(model, tokenizer, compile=model.is_compiled and model.head_weight.device.type == "cpu")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How answers are drawn."""

    prompts: int = 16
    """Prompts of one rollout phase."""
    samples: int = 8
    """Answers to each prompt: the group whose mean is the baseline. 1 where no group is needed (SPO, PPO)."""
    temperature: float = 1.0
    """Divides the logits; the policy that is trained is the one at this temperature."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability. Below 1 the sampler is not the policy; the
    correction of `correction_cap` then does not make up for the tail that is never drawn."""
    max_tokens: int = 128
    """Longest answer of a turn, in tokens."""
    max_turns: int = 1
    """Most turns of the model in an episode; above 1 for environments that reply."""
    enable_thinking: bool = False
    """Open the think block, so that the model reasons before it answers."""
    thinking_share: float = 1.0
    """Share of the prompts that are to be reasoned about, with enable_thinking; the others are answered at once. A
    prompt is asked in the same way every time."""
    environment_seconds: float = 60.0
    """Longest wait for one reset or step of an environment, in seconds. An episode that takes longer is left out of
    the update and counted as `environment_timeouts`."""
    environment_threads: int = 16
    """Environments that reset or step at once, each in a thread. 1 for code that must not run beside itself."""

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "max_tokens", "max_turns", "environment_threads"):
            if getattr(self, name) < 1:
                raise UserError(f"rollout.{name} is {getattr(self, name)}: it must be at least 1")
        if self.temperature <= 0:
            raise UserError(f"rollout.temperature is {self.temperature}: it must be positive, or nothing is explored")
        for name in ("top_p", "thinking_share"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"rollout.{name} is {getattr(self, name)}: it must lie above 0 and up to 1")
        check_seconds("rollout.environment_seconds", self.environment_seconds)
        if not self.enable_thinking:
            refuse_unused(self, {"thinking_share": "rollout.enable_thinking is false"}, "rollout.")

    def thinks(self, prompt: Prompt) -> bool:
        """Whether the model is to reason about a prompt: drawn from its text, so that what is remembered of a prompt
        (by SPO, by a curriculum) is of one way to answer it."""
        if not self.enable_thinking:
            return False
        return random.Random(f"thinking {prompt.conversation.messages}").random() < self.thinking_share


@dataclass
class Trajectory:
    """One finished episode."""

    environment: Environment
    """None, whatever the type says, once the episode has come from another process or a checkpoint."""
    group: int
    """Which prompt of the phase."""
    ids: list[int]
    """Everything the model read and wrote."""
    trained: list[bool]
    """True where the model wrote the token (the one that ended its turn included); the environment's are not its
    doing."""
    sampler_logprobs: list[float] = field(default_factory=list)
    """Of the trained tokens, in order, under the distribution that they were drawn from."""
    answers: list[Message] = field(default_factory=list)
    """The model's turns, parsed."""
    ending: Ending = "turns"
    reward: float = 0.0
    """The environment's rewards, and after scoring all of them, weighted."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Each reward before its weight."""
    conversation: Conversation = field(default_factory=lambda: Conversation(()))
    """Everything that was said as messages, from the environment's opening to the last turn, and the tools; empty once
    the episode has come from a checkpoint."""
    left_out: LeftOut | None = None
    """Why nobody can say what the episode is worth: it is not trained on. None for an episode like any other."""
    thinking: bool = False
    """The model was to reason before it answers."""

    @property
    def answer(self) -> Message:
        """The last turn."""
        return self.answers[-1]

    @property
    def written(self) -> str:
        """What the model thought and said in all its turns."""
        texts = [text for turn in self.answers for text in (turn.reasoning_content, turn.content)]
        return "\n".join(text for text in texts if text)

    @property
    def calls(self) -> list[str]:
        """What each of its calls says: whom it calls, and with what; equal for equal calls."""
        calls = [call for turn in self.answers for call in turn.tool_calls]
        return [
            "\n".join([call.name, *(f"{name} {value}" for name, value in call.arguments.items())]) for call in calls
        ]

    @property
    def num_trained(self) -> int:
        """Tokens that the model wrote."""
        return len(self.sampler_logprobs)


def play(
    engine: RolloutEngine,
    environments: Sequence[Environment],
    places: Sequence[int],
    config: RolloutConfig,
    *,
    seed: int,
    longest: int,
    greedy: bool = False,
) -> list[Trajectory]:
    """Play every environment to its end, all of them side by side in the engine.

    places: the number of each episode in the phase. greedy: the likeliest token every time. Draws depend on `seed` and
    on an episode's place alone. An episode that would outgrow `longest` tokens with its next turn ends with `length`;
    one whose environment takes longer than `config.environment_seconds` is `left_out`. The environments of different
    episodes reset and step side by side. UserError where an environment breaks, or opens with too many tokens.
    """
    openings = reset_all(environments, seconds=config.environment_seconds, threads=config.environment_threads)
    trajectories = [
        _begin(engine, environment, opening, config, longest)
        for environment, opening in zip(environments, openings, strict=True)
    ]
    active = list(zip(places, trajectories, strict=True))
    for turn in range(config.max_turns):
        outputs = engine.generate(
            [trajectory.ids for _, trajectory in active],
            [_sampling(config, seed, turn, place, greedy) for place, _ in active],
        )
        asking = [
            (place, trajectory)
            for (place, trajectory), output in zip(active, outputs, strict=True)
            if _take_turn(engine, trajectory, output.completions[0])
        ]
        replies = step_all(
            [trajectory.environment for _, trajectory in asking],
            [trajectory.answer for _, trajectory in asking],
            seconds=config.environment_seconds,
            threads=config.environment_threads,
        )
        last = turn + 1 == config.max_turns
        active = [
            (place, trajectory)
            for (place, trajectory), reply in zip(asking, replies, strict=True)
            if _hear(engine, trajectory, reply, config, longest, last=last)
        ]
        if not active:
            break
    late = [trajectory for trajectory in trajectories if trajectory.ending == "timeout"]
    if late:
        _log.warning(
            "%d of %d episodes ended because their environment took more than rollout.environment_seconds (%g); the "
            "first is that of the prompt %s",
            len(late), len(trajectories), config.environment_seconds, shown(late[0].environment.prompt),
        )  # fmt: skip
    return trajectories


def _begin(
    engine: RolloutEngine,
    environment: Environment,
    opening: Conversation | None,
    config: RolloutConfig,
    longest: int,
) -> Trajectory:
    """The episode before its first turn. Without an opening it is left out, but asked its plain prompt all the same: a
    phase's episodes all have tokens."""
    conversation = environment.prompt.conversation if opening is None else opening
    thinking = config.thinks(environment.prompt)
    rendered = render(engine.tokenizer, conversation, add_generation_prompt=True, enable_thinking=thinking)
    ids = rendered.ids.tolist()
    if len(ids) + config.max_tokens > longest:
        raise UserError(
            f"the environment for the prompt {shown(environment.prompt)} opens with {len(ids)} tokens; with an answer "
            f"of rollout.max_tokens {config.max_tokens} that does not fit sequence_length {longest}"
        )
    trajectory = Trajectory(environment, 0, ids, [False] * len(ids), thinking=thinking, conversation=conversation)
    if opening is None:
        _give_up(trajectory)
    return trajectory


def _sampling(config: RolloutConfig, seed: int, turn: int, place: int, greedy: bool) -> SamplingParams:
    return SamplingParams(
        temperature=0.0 if greedy else config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        seed=zlib.crc32(f"{seed}/{turn}/{place}".encode()),
        logprobs=True,
    )


def _take_turn(engine: RolloutEngine, trajectory: Trajectory, completion: Completion) -> bool:
    """Append the model's turn. Whether the environment is to hear it."""
    assert completion.logprobs is not None
    trajectory.ids += completion.ids
    trajectory.trained += [True] * len(completion.ids)
    trajectory.sampler_logprobs += completion.logprobs
    answer = parse_assistant_ids(engine.tokenizer, completion.ids, thinking=trajectory.thinking)
    trajectory.answers.append(answer)
    trajectory.conversation = _with(trajectory.conversation, answer)
    if trajectory.left_out is not None:
        return False
    if completion.finish_reason == "length":
        trajectory.ending = "length"
        return False
    return True


def _give_up(trajectory: Trajectory) -> None:
    """The environment took too long; it may still be at it."""
    trajectory.ending, trajectory.left_out = "timeout", "environment"


def _hear(
    engine: RolloutEngine,
    trajectory: Trajectory,
    reply: Reply | None,
    config: RolloutConfig,
    longest: int,
    *,
    last: bool,
) -> bool:
    """Take in the environment's reply. Whether the model has another turn."""
    if reply is None:
        _give_up(trajectory)
        return False
    trajectory.reward += reply.reward
    ended_text = trajectory.ids[-1] != engine.tokenizer.im_end_id  # and not its turn: nothing can follow
    if reply.done or ended_text:
        trajectory.ending = "stop"
        return False
    if last:
        return False
    ids = render_continuation(engine.tokenizer, reply.messages, enable_thinking=trajectory.thinking)
    if len(trajectory.ids) + len(ids) + config.max_tokens > longest:
        trajectory.ending = "length"
        return False
    trajectory.ids += ids
    trajectory.trained += [False] * len(ids)
    trajectory.conversation = _with(trajectory.conversation, *reply.messages)
    return True


def _with(conversation: Conversation, *messages: Message) -> Conversation:
    return Conversation((*conversation.messages, *messages), conversation.tools)
