"""The task `arithmetic`: held-out exercises with the think block open and with it closed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minnow.data.pond.arithmetic import Problem, problems
from minnow.data.pond.questions import normal_form
from minnow.data.pond.relations import LANGUAGES
from minnow.data.pond.world import World
from minnow.engine.outputs import Completion
from minnow.engine.sampling import SamplingParams
from minnow.evaluation.pond import find_world
from minnow.evaluation.registry import Score, Subject, Task, TaskOptions, register
from minnow.evaluation.statistics import Interval, wilson_interval
from minnow.tokenizer.chat import Conversation, Message, render
from minnow.tokenizer.parse import parse_assistant_ids
from minnow.tokenizer.special import CHAT_TOKENS, END_THINK, IM_END
from minnow.tokenizer.tokenizer import Tokenizer

Measure = Literal["accuracy", "format"]


@dataclass(frozen=True)
class Trial:
    """One exercise, asked with thinking on or off, and what is looked at in the answer."""

    problem: Problem
    thinking: bool
    measure: Measure


class ArithmeticTask(Task[Trial]):
    """Figures `accuracy/thinking_on`, `accuracy/thinking_off` (the right sentence) and `format/...`.

    The format of thinking: some reasoning, `</think>` once, an answer, the end of the turn. Without: no tag at all
    before the end of the turn.
    """

    name = "arithmetic"
    unit = "share"
    max_tokens = 128

    def __init__(self, world: World, count: int = 300) -> None:
        streams = [problems(world, "held_out", language) for language in LANGUAGES]
        asked = [problem for stream in streams for problem in itertools.islice(stream, count // 2)]
        measures: tuple[Measure, ...] = ("accuracy", "format")
        self._rows = [
            Trial(problem, thinking, measure)
            for thinking, measure, problem in itertools.product((True, False), measures, asked)
        ]

    def rows(self) -> Sequence[Trial]:
        """Every exercise four times."""
        return self._rows

    def figure(self, row: Trial) -> str:
        """By measure and mode."""
        return f"{row.measure}/thinking_{'on' if row.thinking else 'off'}"

    def score_rows(self, subject: Subject, rows: Sequence[Trial]) -> list[Score]:
        """Ask each exercise once a mode."""
        tokenizer = subject.tokenizer
        asked = list(dict.fromkeys((row.problem, row.thinking) for row in rows))
        prompts = [
            render(
                tokenizer,
                Conversation((Message("user", problem.prompt),)),
                add_generation_prompt=True,
                enable_thinking=thinking,
            ).ids.tolist()
            for problem, thinking in asked
        ]
        results = subject.engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=self.max_tokens))
        completions = {key: result.completions[0] for key, result in zip(asked, results, strict=True)}
        return [self._score(tokenizer, row, completions[row.problem, row.thinking]) for row in rows]

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Wilson's."""
        return wilson_interval(sum(score.value for score in scores), len(scores))

    def _score(self, tokenizer: Tokenizer, row: Trial, completion: Completion) -> Score:
        message = parse_assistant_ids(tokenizer, completion.ids, thinking=row.thinking)
        if row.measure == "accuracy":
            right = normal_form(message.content) == normal_form(row.problem.answer)
        else:
            right = has_format(tokenizer, completion.ids, thinking=row.thinking)
        details = {
            "prompt": row.problem.prompt,
            "thinking": row.thinking,
            "reasoning": message.reasoning_content,
            "answer": message.content,
            "expected": row.problem.answer,
        }
        return Score(float(right), details=details)


def has_format(tokenizer: Tokenizer, ids: Sequence[int], *, thinking: bool) -> bool:
    """Whether generated `ids` are a whole turn: with thinking reasoning, `</think>` and an answer, else an answer.

    Tags count where they are control tokens and where they are spelled out.
    """
    control = {tokenizer.special_ids[token]: token for token in CHAT_TOKENS}
    tags = [control[i] for i in ids if i in control]
    message = parse_assistant_ids(tokenizer, ids, thinking=thinking)
    spelled = any(token in text for token in CHAT_TOKENS for text in (message.content, message.reasoning_content or ""))
    if not message.content.strip() or spelled:
        return False
    return tags == [END_THINK, IM_END] and bool(message.reasoning_content) if thinking else tags == [IM_END]


@register("arithmetic")
def make(options: TaskOptions) -> Task[Trial]:
    """Held-out exercises of the pond."""
    return ArithmeticTask(find_world(options))
