"""The task `wins`: against another model, on prompts whose right answer is known; no judge has a say."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minnow.config import UserError
from minnow.data.pond.preferences import PondPair, preference_pairs
from minnow.data.pond.questions import normal_form
from minnow.evaluation.pond import find_world
from minnow.evaluation.preference import POND_PAIRS
from minnow.evaluation.registry import Score, Subject, Task, TaskOptions, greedy_answers, register
from minnow.evaluation.statistics import Interval, wilson_interval
from minnow.model.pretrained import load_pretrained, resolve_model_folder
from minnow.tokenizer.chat import Conversation, Message
from minnow.tokenizer.tokenizer import Tokenizer

Measure = Literal["win_rate", "right", "right_against"]
MAX_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """One prompt, and what is looked at in the two answers."""

    pair: PondPair
    measure: Measure


class WinsTask(Task[Comparison]):
    """Figures `win_rate`, `right/...` and `right_against/...`, on the pond's held-out preference prompts.

    Right is the better answer of the pair, word for word after `normal_form`: the fact about a creature of the pond,
    "I do not know" about a visitor. `win_rate` is the share of prompts won among those that only one of the two
    answers right; where both are right or both wrong nobody wins. `right` and `right_against` are the two models'
    own shares, by kind of prompt.
    """

    name = "wins"
    unit = "share"

    def __init__(self, pairs: Sequence[PondPair], opponent: Subject) -> None:
        measures: tuple[Measure, ...] = ("win_rate", "right", "right_against")
        self._rows = [Comparison(pair, measure) for measure, pair in itertools.product(measures, pairs)]
        self.opponent = opponent

    def rows(self) -> Sequence[Comparison]:
        """Every prompt three times."""
        return self._rows

    def figure(self, row: Comparison) -> str:
        """By measure, and for a model's own share by kind of prompt."""
        return row.measure if row.measure == "win_rate" else f"{row.measure}/{'known' if row.pair.known else 'visitor'}"

    def score_rows(self, subject: Subject, rows: Sequence[Comparison]) -> list[Score]:
        """Let both models answer each prompt greedily."""
        pairs = list(dict.fromkeys(row.pair for row in rows))
        mine = dict(zip(pairs, _answers(subject, pairs), strict=True))
        theirs = dict(zip(pairs, _answers(self.opponent, pairs), strict=True))
        return [_score(row, mine[row.pair], theirs[row.pair]) for row in rows]

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Wilson's over the decided prompts; without any, all is open."""
        trials = round(sum(score.weight for score in scores))
        return wilson_interval(sum(score.value for score in scores), trials) if trials else Interval(0.5, 0.0, 1.0)


def _score(row: Comparison, mine: str, theirs: str) -> Score:
    right, right_against = (normal_form(answer) == normal_form(row.pair.chosen) for answer in (mine, theirs))
    details = {"prompt": row.pair.prompt, "answer": mine, "answer_against": theirs, "expected": row.pair.chosen}
    if row.measure == "win_rate":
        return Score(float(right and not right_against), float(right != right_against), details)
    return Score(float(right if row.measure == "right" else right_against), details=details)


def _answers(subject: Subject, pairs: Sequence[PondPair]) -> list[str]:
    return greedy_answers(subject, [Conversation((Message("user", pair.prompt),)) for pair in pairs], MAX_TOKENS)


@register("wins")
def make(options: TaskOptions) -> Task[Comparison]:
    """The examined model against the one of `--against`."""
    if options.against is None or options.subject is None:
        raise UserError("--tasks wins: say which model it is compared with, with --against")
    folder = resolve_model_folder(options.against)
    tokenizer = Tokenizer.from_pretrained(folder)
    try:
        tokenizer.require_chat_tokens()
    except UserError as error:
        raise UserError(f"--against {options.against}: {error}") from None
    opponent = load_pretrained(folder, device=options.subject.model.head_weight.device)
    pairs = list(preference_pairs(find_world(options), "held_out", POND_PAIRS))
    return WinsTask(pairs, Subject(opponent, tokenizer))
