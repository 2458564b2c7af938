"""Tasks: rows, how a row is put to the model, how its answer is scored, and the error bar of the figure.

A task that asks the model to write derives from `GenerationTask`; one that reads probabilities derives from `Task`
itself. Registered under a name, `minnow eval --tasks NAME` finds it:

    @register("capitals")
    def capitals(options: TaskOptions) -> Task: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from minnow.config import UserError
from minnow.engine.engine import Engine
from minnow.engine.sampling import SamplingParams
from minnow.evaluation.statistics import Interval, wilson_interval
from minnow.model.transformer import CausalLM
from minnow.tokenizer.chat import Conversation, render
from minnow.tokenizer.tokenizer import Tokenizer

Row = TypeVar("Row")


@dataclass
class Subject:
    """The model under examination."""

    model: CausalLM
    tokenizer: Tokenizer

    @cached_property
    def engine(self) -> Engine:
        """An engine around the model, made when the first task asks it to write."""
        return Engine(self.model, self.tokenizer)


@dataclass(frozen=True)
class Score:
    """What one row contributes to a figure: figures are sum(value) / sum(weight)."""

    value: float
    weight: float = 1.0
    details: dict[str, Any] = field(default_factory=dict)
    """What a person wants to see of the row: prompt, answer, what was expected."""


class Task(ABC, Generic[Row]):
    """One examination."""

    name: str
    unit: str
    """Of its figures: "share" (0 to 1), "bits per byte" ..."""

    @abstractmethod
    def rows(self) -> Sequence[Row]:
        """What is asked, always in the same order."""

    @abstractmethod
    def figure(self, row: Row) -> str:
        """The figure that `row` counts for, such as "exact_match/en"."""

    @abstractmethod
    def score_rows(self, subject: Subject, rows: Sequence[Row]) -> list[Score]:
        """Examine the model; one score per row, in order."""

    @abstractmethod
    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """A figure and its 95% interval from the scores of its rows."""


def greedy_answers(subject: Subject, conversations: Sequence[Conversation], max_tokens: int) -> list[str]:
    """The turn that the model adds to each conversation, by the likeliest token every time."""
    subject.tokenizer.require_chat_tokens()
    prompts = [render(subject.tokenizer, each, add_generation_prompt=True) for each in conversations]
    results = subject.engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens))
    return [result.completions[0].text for result in results]


class GenerationTask(Task[Row]):
    """A task that the model answers in writing, greedily, through the engine in batches."""

    unit = "share"
    max_tokens = 64

    @abstractmethod
    def prompt(self, row: Row) -> Conversation:
        """The conversation to which the model adds its turn."""

    @abstractmethod
    def score(self, row: Row, answer: str) -> Score:
        """Judge one answer, 0 to 1."""

    def score_rows(self, subject: Subject, rows: Sequence[Row]) -> list[Score]:
        """Generate all answers and judge each."""
        answers = greedy_answers(subject, [self.prompt(row) for row in rows], self.max_tokens)
        return [self.score(row, answer) for row, answer in zip(rows, answers, strict=True)]

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Wilson's: the rows are trials that succeed or fail."""
        return wilson_interval(sum(score.value for score in scores), len(scores))


@dataclass(frozen=True)
class TaskOptions:
    """What a task may need to find its rows."""

    model_folder: Path | None = None
    """Folder of the examined model: a pond beside it is found by itself."""
    subject: Subject | None = None
    """The model, for tasks whose rows depend on it."""
    pond: Path | None = None
    """A folder that `minnow data pond` wrote."""
    texts: tuple[str, ...] = ()
    """Text files to measure bits per byte on."""
    pairs: tuple[str, ...] = ()
    """Files of preference pairs."""
    choices: tuple[str, ...] = ()
    """Files of questions with choices."""
    shots: int = 0
    """Solved questions in front of each of them."""
    shots_from: str | None = None
    """File that these come from; None: the file of the question itself."""
    judge: str | None = None
    """A reward model's folder."""
    against: str | None = None
    """Another model, for tasks that compare two."""
    context: int | None = None
    """Longest text of long-context, in tokens."""


def labels(paths: Sequence[str]) -> list[str]:
    """What the figures of given files are called: the file's name, and as many of its folders as tell it from others.

    No more of them, for figures go into the model's card, and with it to the Hub.
    """
    every = [Path(path).parts for path in paths]
    return [_told_apart(own, [other for other in every if other != own]) for own in every]


def _told_apart(own: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
    return "/".join(own[-length:])


Make = Callable[[TaskOptions], Task[Any] | Sequence[Task[Any]]]
TASKS: dict[str, Make] = {}


def register(name: str) -> Callable[[Make], Make]:
    """Put the decorated function, which makes the task (or several, of different units), into the registry."""

    def add(make: Make) -> Make:
        TASKS[name] = make
        return make

    return add


def make_tasks(name: str, options: TaskOptions) -> list[Task[Any]]:
    """What is registered as `name`. UserError when there is nothing, or when `options` lack what it needs."""
    if name not in TASKS:
        raise UserError(f"--tasks {name}: no such task; there are {', '.join(sorted(TASKS))}")
    made = TASKS[name](options)
    return [made] if isinstance(made, Task) else list(made)
