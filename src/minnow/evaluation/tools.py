"""The task `tools`: are the right functions called with the right arguments, and their results understood?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minnow.config import UserError
from minnow.data.pond.questions import normal_form
from minnow.data.pond.tools import Episode, sample_episodes
from minnow.data.pond.world import World
from minnow.engine.sampling import SamplingParams
from minnow.evaluation.bfcl import FILE, BfclTask
from minnow.evaluation.pond import find_world
from minnow.evaluation.registry import Score, Subject, Task, TaskOptions, register
from minnow.evaluation.statistics import Interval, wilson_interval
from minnow.evaluation.turns import ask
from minnow.tokenizer.chat import Message, ToolCall


@dataclass(frozen=True, eq=False)
class Trial:
    """One episode, and what is looked at."""

    episode: Episode
    measure: Literal["calls", "success"]


class PondToolsTask(Task[Trial]):
    """Figures `calls/KIND` (names and arguments exactly, in any order) and `success` (and the right answer after them).

    The model first sees the request alone. Where its calls are right it gets their results, and its answer is compared
    after `normal_form`; where no call is needed, its first words are the answer.
    """

    name = "tools"
    unit = "share"

    def __init__(self, world: World, count: int = 400) -> None:
        self._episodes = sample_episodes(world, "held_out", count)

    def rows(self) -> Sequence[Trial]:
        """Every held-out episode twice."""
        return [Trial(e, measure) for measure in ("calls", "success") for e in self._episodes]

    def figure(self, row: Trial) -> str:
        """By kind of episode, and over all."""
        return f"calls/{row.episode.kind}" if row.measure == "calls" else "success"

    def score_rows(self, subject: Subject, rows: Sequence[Trial]) -> list[Score]:
        """Two turns for each episode."""
        asked = list({id(row.episode): row.episode for row in rows}.values())
        params = SamplingParams(temperature=0.0, max_tokens=256)
        first = dict(zip(map(id, asked), ask(subject, [e.request for e in asked], params), strict=True))
        right = {id(e): same_calls(first[id(e)].tool_calls, e.calls) for e in asked}
        going_on = [e for e in asked if e.calls and right[id(e)]]
        final = first | dict(zip(map(id, going_on), ask(subject, [e.answered for e in going_on], params), strict=True))
        return [_score(row, first[id(row.episode)], right[id(row.episode)], final[id(row.episode)]) for row in rows]

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Wilson's."""
        return wilson_interval(sum(score.value for score in scores), len(scores))


def _score(row: Trial, first: Message, right_calls: bool, final: Message) -> Score:
    episode = row.episode
    right = right_calls
    if row.measure == "success":
        right = right_calls and not final.tool_calls and normal_form(final.content) == normal_form(episode.answer)
    details = {
        "prompt": episode.prompt,
        "calls": [vars(call) for call in first.tool_calls],
        "expected_calls": [vars(call) for call in episode.calls],
        "answer": final.content,
        "expected": episode.answer,
    }
    return Score(float(right), details=details)


def same_calls(calls: Sequence[ToolCall], expected: Sequence[ToolCall]) -> bool:
    """Whether both hold the same calls, in whatever order: calls of one turn are made at once."""
    left = list(expected)
    for call in calls:
        if call not in left:
            return False
        left.remove(call)
    return not left


@register("tools")
def make(options: TaskOptions) -> list[Task[Any]]:
    """The pond's tools, and the Berkeley Function Calling Leaderboard's rows where MINNOW_DATA has them."""
    tasks: list[Task[Any]] = []
    file = Path(os.environ.get("MINNOW_DATA", "")) / FILE
    if "MINNOW_DATA" in os.environ and file.is_file():
        tasks.append(BfclTask(file))
    try:
        tasks.insert(0, PondToolsTask(find_world(options)))
    except UserError:
        if options.pond is not None or not tasks:
            raise
    return tasks
