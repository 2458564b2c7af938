"""Rewards: weighted, added up, and logged one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minnow.config import UserError, refuse_unused
from minnow.data.prompts import Prompt
from minnow.errors import first_line
from minnow.evaluation.judge import Judge, load_judge
from minnow.rl.answers import AnswerKind, check_reference, final_answer, is_right
from minnow.rl.environment_calls import shown
from minnow.rl.judge import JudgeConfig, judge_reward
from minnow.rl.maths import MathsJudge
from minnow.rl.rollouts import RolloutConfig, Trajectory
from minnow.rl.text_rewards import (
    format_reward,
    language_reward,
    length_reward,
    overlong_reward,
    repetition_reward,
)
from minnow.rl.timed_calls import check_seconds, run_all, where
from minnow.rl.user_code import load_object

if TYPE_CHECKING:
    import jsonschema_rs

RewardFunction = Callable[[Sequence[Trajectory]], Sequence[float]]
"""Judges finished episodes; one number each. An exception stops the run: a silent 0 would teach something false. Ours
may mark an episode as left out instead."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What is rewarded, and how much. Every number is a weight; 0 turns a reward off."""

    answer: float = 1.0
    """1 where the last turn says what the row's reference says. Off in the environment guess, which knows itself."""
    answer_kind: AnswerKind = "auto"
    """text, number (the last in the answer), maths (by the library math-verify), contains (every item of the
    reference), or auto: number where the reference is one, contains where it is a list, else text. Of a reference with
    #### in it, as GSM8K's, what stands behind that counts."""
    maths_seconds: float = 5.0
    """Longest time, in seconds, for one comparison of answer_kind maths, which a power of powers can keep busy for
    ever. An answer that takes longer is left out of the update and counted as `answer_timeouts`."""
    environment: float = 1.0
    """What the environment itself gave, over all turns."""
    format: float = 0.0
    """1 for a turn that ended by itself, says something, and thought exactly if it was to think."""
    length: float = 0.0
    """1 for an answer of `shortest` to `longest` tokens, falling to 0 outside."""
    shortest: int = 1
    """Tokens of the shortest answer that `length` likes."""
    longest: int = 256
    """Tokens of the longest answer that `length` likes."""
    overlong: float = 0.0
    """-1 for an answer that was cut off (DAPO's overlong punishment)."""
    overlong_buffer: float = 0.0
    """Last share of the tokens an episode may have, over which `overlong` already falls from 0 to -1 (DAPO: 0.2)."""
    repetition: float = 0.0
    """Down to -1 for an episode that goes round in a loop, in its thoughts or by making the same call again too."""
    language: float = 0.0
    """Share of the answer's letters in the script of the prompt, 0 to 1."""
    json_schema: float = 0.0
    """1 where the answer is JSON that fits the row's `schema`."""
    reward_model: str | None = None
    """A reward model (folder, run folder or Hub id; `minnow reward` trains one) that reads the whole episode: prompt,
    tools, thoughts, calls and their results, up to the last answer."""
    reward_model_weight: float = 1.0
    """Weight of its number."""
    reward_model_squash: bool = False
    """Take the sigmoid of its number: 0 to 1, as SPO needs."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """A language model that marks the answers."""
    functions: tuple[str, ...] = ()
    """Python functions of yours, MODULE:FUNCTION@WEIGHT: called with the list of trajectories, return a list of
    numbers."""
    functions_seconds: float = 600.0
    """Longest time, in seconds, that one of them may take for all answers of a phase; then the run stops."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlong_buffer <= 1:
            raise UserError(f"rewards.overlong_buffer is {self.overlong_buffer}: it is a share, from 0 to 1")
        if not 0 <= self.shortest <= self.longest or self.longest < 1:
            raise UserError(
                f"rewards.shortest {self.shortest} and rewards.longest {self.longest} are no range of lengths: the "
                "longest answer has 1 token or more, and the shortest not more than it"
            )
        check_seconds("rewards.maths_seconds", self.maths_seconds)
        check_seconds("rewards.functions_seconds", self.functions_seconds)
        unused: dict[str, str] = {}
        if not self.length:
            unused |= dict.fromkeys(("shortest", "longest"), "rewards.length is 0")
        if not self.overlong:
            unused["overlong_buffer"] = "rewards.overlong is 0"
        if self.reward_model is None:
            unused |= dict.fromkeys(("reward_model_weight", "reward_model_squash"), "rewards.reward_model is null")
        refuse_unused(self, unused, "rewards.")


class Rewarder:
    """Scores trajectories: `rewards` by name, and `reward`, their weighted sum."""

    def __init__(
        self,
        config: RewardConfig,
        *,
        max_tokens: int = RolloutConfig.max_tokens,
        device: torch.device | str = "cpu",
    ) -> None:
        """`max_tokens`: most tokens of an episode; `device`: where a reward model is put.

        UserError for a function or a model that cannot be loaded.
        """
        self._answer_kind = config.answer_kind
        buffer = config.overlong_buffer * max_tokens
        maths = MathsJudge(config.maths_seconds) if config.answer and config.answer_kind == "maths" else None
        built_in: dict[str, tuple[float, RewardFunction]] = {
            "answer": (config.answer, lambda items: _answers(items, config.answer_kind, maths)),
            "environment": (config.environment, lambda items: [item.reward for item in items]),
            "format": (config.format, lambda items: [_format(item) for item in items]),
            "length": (
                config.length,
                lambda items: [length_reward(item.num_trained, config.shortest, config.longest) for item in items],
            ),
            "overlong": (config.overlong, lambda items: [_overlong(item, max_tokens, buffer) for item in items]),
            "repetition": (
                config.repetition,
                lambda items: [repetition_reward(item.written, item.calls) for item in items],
            ),
            "language": (config.language, lambda items: [_language(item) for item in items]),
            "json_schema": (config.json_schema, lambda items: [_fits_schema(item) for item in items]),
        }
        self._rewards = {name: entry for name, entry in built_in.items() if entry[0]}
        for written in config.functions:
            name, weight, function = _load(written)
            self._rewards[name] = (weight, _in_time(name, function, config.functions_seconds))
        if config.judge.url is not None and config.judge.weight:
            self._rewards["judge"] = (config.judge.weight, lambda items: judge_reward(config.judge, items))
        self.reward_model: nn.Module | None = None
        if config.reward_model is not None:
            judge = load_judge(config.reward_model, torch.device(device))
            self.reward_model, squash = judge.model, config.reward_model_squash
            self._rewards["reward_model"] = (config.reward_model_weight, lambda items: _marks(items, judge, squash))
        if not self._rewards:
            raise UserError(
                "every reward has weight 0: give at least one, such as rewards.answer, or rewards.environment in a game"
            )
        for name, (weight, _) in self._rewards.items():
            if not math.isfinite(weight):
                raise UserError(f"the reward {name!r} has weight {weight}: it must be a finite number")

    @property
    def names(self) -> list[str]:
        """What is rewarded."""
        return list(self._rewards)

    def check(self, prompts: Iterable[Prompt]) -> None:
        """UserError for a prompt whose answers cannot be judged: a run that came upon it could not go on."""
        for prompt in prompts:
            if "answer" in self._rewards and prompt.reference is not None:
                check_reference(prompt.reference, self._answer_kind)
            if "json_schema" in self._rewards:
                _validator(prompt)

    def score(self, trajectories: Sequence[Trajectory]) -> None:
        """Fill in `rewards` and `reward` of all but what is left out, or is now. UserError when a reward fails or is
        not a finite number."""
        for name, (_, function) in self._rewards.items():
            judged = [trajectory for trajectory in trajectories if trajectory.left_out is None]
            for trajectory, value in zip(judged, self._call(name, function, judged), strict=True):
                trajectory.rewards[name] = value
        for trajectory in trajectories:
            if trajectory.left_out is not None:
                trajectory.reward, trajectory.rewards = 0.0, {}
                continue
            trajectory.reward = sum(weight * trajectory.rewards[name] for name, (weight, _) in self._rewards.items())

    def _call(self, name: str, function: RewardFunction, trajectories: Sequence[Trajectory]) -> list[float]:
        if not trajectories:
            return []
        try:
            values = list(function(trajectories))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the reward {name!r} failed: {where(error)}") from error
        if len(values) != len(trajectories):
            raise UserError(f"the reward {name!r} gave {len(values)} numbers for {len(trajectories)} answers")
        return [_finite(name, value, trajectory) for value, trajectory in zip(values, trajectories, strict=True)]


def _finite(name: str, value: Any, trajectory: Trajectory) -> float:
    """A reward as a number: Python's, NumPy's or torch's; True is 1. Texts are none, though `float` reads some."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a tensor of several numbers raises the last
        number = math.nan
    if not math.isfinite(number):
        asked, gave = shown(trajectory.environment.prompt), repr(value)[:80]
        raise UserError(
            f"the reward {name!r} gave {gave} for the prompt {asked}: rewards must be finite numbers, one an answer"
        )
    return number


def _marks(trajectories: Sequence[Trajectory], judge: Judge, squash: bool) -> list[float]:
    marks = judge([trajectory.conversation for trajectory in trajectories])
    return [0.5 * (1 + math.tanh(mark / 2)) for mark in marks] if squash else marks  # the sigmoid, without overflow


def _overlong(trajectory: Trajectory, max_tokens: int, buffer: float) -> float:
    return -1.0 if trajectory.ending == "length" else overlong_reward(trajectory.num_trained, max_tokens, buffer)


def _answers(trajectories: Sequence[Trajectory], kind: AnswerKind, maths: MathsJudge | None) -> list[float]:
    """1 for a right answer, 0 for a wrong, a cut-off and an unasked one. Marks those that nobody can compare in time as
    left out; their number means nothing."""
    if maths is None:
        return [float(_can_be_right(t) and is_right(_said(t), _reference(t), kind)) for t in trajectories]
    asked = [trajectory for trajectory in trajectories if _can_be_right(trajectory)]
    equal = maths.compare([(_said(each), str(final_answer(_reference(each), kind))) for each in asked])
    right: set[int] = set()
    for trajectory, same in zip(asked, equal, strict=True):
        if same is None:
            trajectory.left_out = "answer"
        elif same:
            right.add(id(trajectory))
    return [float(id(trajectory) in right) for trajectory in trajectories]


def _can_be_right(trajectory: Trajectory) -> bool:
    return _reference(trajectory) is not None and trajectory.ending != "length"


def _reference(trajectory: Trajectory) -> Any:
    return trajectory.environment.prompt.reference


def _said(trajectory: Trajectory) -> str:
    return trajectory.answer.content


def _format(trajectory: Trajectory) -> float:
    return format_reward(trajectory.answer, thinking=trajectory.thinking, ended=trajectory.ending != "length")


def _language(trajectory: Trajectory) -> float:
    users = [m.content for m in trajectory.environment.prompt.conversation.messages if m.role == "user"]
    return language_reward(users[-1] if users else "", _said(trajectory))


def _fits_schema(trajectory: Trajectory) -> float:
    validator = _validator(trajectory.environment.prompt)
    try:
        value = json.loads(_said(trajectory))
        return float(validator.is_valid(value))
    except (ValueError, RecursionError):  # no JSON, half a character, or brackets without end
        return 0.0


def _validator(prompt: Prompt) -> jsonschema_rs.Validator:
    import jsonschema_rs

    schema = prompt.row.get("schema")
    if not isinstance(schema, dict):
        raise UserError("the reward json_schema needs a `schema` object in every row of the prompts")
    try:
        return jsonschema_rs.validator_for(schema, retriever=_refuse)  # or it would fetch any address of a row
    except ValueError as error:
        asked, problem = shown(prompt), first_line(error)
        raise UserError(f"the reward json_schema: the `schema` of the prompt {asked} is none: {problem}") from None


def _refuse(uri: str) -> Any:
    raise ValueError("a schema may refer to its own parts only")


def _in_time(name: str, function: RewardFunction, seconds: float) -> RewardFunction:
    """The user's own function, called in a thread and waited for so long."""

    def call(trajectories: Sequence[Trajectory]) -> Sequence[float]:
        (outcome,) = run_all([lambda: function(trajectories)], seconds=seconds, threads=1)
        if isinstance(outcome, TimeoutError):
            raise UserError(
                f"the reward {name!r} took more than rewards.functions_seconds ({seconds:g}) for {len(trajectories)} "
                "answers: look into what hangs, or raise it"
            ) from outcome
        if isinstance(outcome, BaseException):
            raise UserError(f"the reward {name!r} failed: {where(outcome)}") from outcome
        return outcome

    return call


def _load(written: str) -> tuple[str, float, RewardFunction]:
    """MODULE:FUNCTION@WEIGHT -> its name, weight and function."""
    path, _, weight_text = written.partition("@")
    try:
        weight = float(weight_text or 1)
    except ValueError:
        raise UserError(f"rewards.functions {written!r}: write MODULE:FUNCTION or MODULE:FUNCTION@WEIGHT") from None
    return path, weight, load_object(path, "rewards.functions")
