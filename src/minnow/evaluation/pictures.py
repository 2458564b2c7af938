"""The task `pictures`: does the model see? Questions about pictures whose combinations no training picture shows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from minnow.data.pond.picture_questions import PictureQuestion, held_out_path, picture_questions
from minnow.data.pond.picture_words import ASPECTS, Aspect
from minnow.data.pond.pictures import COLOURS, COUNTS, KINDS, PLACES, SIZE, SIZES, draw
from minnow.data.pond.questions import normal_form
from minnow.data.pond.relations import LANGUAGES
from minnow.evaluation.pond import find_world
from minnow.evaluation.registry import Score, Subject, Task, TaskOptions, greedy_answers, register
from minnow.evaluation.statistics import Interval, wilson_interval
from minnow.tokenizer.chat import Conversation, Message
from minnow.tokenizer.images import Image

CHANCE: dict[Aspect, float] = {
    "colour": 1 / len(COLOURS),
    "kind": 1 / len(KINDS),
    "count": 1 / len(COUNTS),
    "place": 1 / len(PLACES),
    "size": 1 / len(SIZES),
}
"""Share of right answers of one who knows what can be answered, and draws."""


Answerer = Literal["model", "model shown grey", "most frequent answer", "chance"]


@dataclass(frozen=True)
class PictureRow:
    """A question that counts for one figure, and who answers it."""

    figure: str
    question: PictureQuestion
    answerer: Answerer = "model"


class PicturesTask(Task[PictureRow]):
    """Exact match of the whole answer, after `normal_form`, on questions about held-out pictures.

    Figures, each by language: `exact_match` (wordings that training used), the same by what is asked for (`colour`,
    `kind`, `count`, `place`, `size`), and `exact_match_unseen_wording`. Beside them, what can be had without looking:
    `grey_picture` (the model's answers to the questions of `exact_match` before a grey picture), `most_frequent` (the
    answer that training gives most often to such a question) and `chance`, whose interval is where one who draws ends
    up.
    """

    name = "pictures"
    unit = "share"
    max_tokens = 24

    def __init__(self, seed: int) -> None:
        self._rows: list[PictureRow] = []
        for language in LANGUAGES:
            asked = picture_questions(seed, "trained", language)
            unseen = picture_questions(seed, "unseen", language)
            self._rows += [PictureRow(f"exact_match/{language}", question) for question in asked]
            self._rows += [PictureRow(f"exact_match_unseen_wording/{language}", question) for question in unseen]
            for aspect in ASPECTS:
                about = [question for question in asked if question.aspect == aspect]
                self._rows += [PictureRow(f"{aspect}/{language}", question) for question in about]
            blind: dict[str, Answerer] = {
                "grey_picture": "model shown grey",
                "most_frequent": "most frequent answer",
                "chance": "chance",
            }
            for figure, answerer in blind.items():
                self._rows += [PictureRow(f"{figure}/{language}", question, answerer) for question in asked]

    def rows(self) -> Sequence[PictureRow]:
        """A question of each aspect about every held-out picture, in two languages, as often as a figure counts it."""
        return self._rows

    def figure(self, row: PictureRow) -> str:
        """What and language."""
        return row.figure

    def score_rows(self, subject: Subject, rows: Sequence[PictureRow]) -> list[Score]:
        """Ask each question once, however many figures count it."""
        asked = list(dict.fromkeys((row.question, row.answerer) for row in rows if row.answerer.startswith("model")))
        pictures = {scene: draw(scene) for scene in {question.scene for question, _ in asked}}
        conversations = [_shown(q, grey() if "grey" in who else pictures[q.scene]) for q, who in asked]
        answers = dict(zip(asked, greedy_answers(subject, conversations, self.max_tokens), strict=True))
        return [_score(row, answers.get((row.question, row.answerer), "")) for row in rows]

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Wilson's."""
        return wilson_interval(sum(score.value for score in scores), len(scores))


def _score(row: PictureRow, answer: str) -> Score:
    question = row.question
    if row.answerer == "chance":
        return Score(CHANCE[question.aspect])
    answer = question.guess if row.answerer == "most frequent answer" else answer
    details = {"picture": held_out_path(question.picture), "prompt": question.prompt, "answer": answer}
    details |= {"expected": question.answer, "answerer": row.answerer}
    return Score(float(normal_form(answer) == normal_form(question.answer)), details=details)


def _shown(question: PictureQuestion, picture: bytes) -> Conversation:
    """As in training, the picture stands before the question."""
    return Conversation((Message("user", question.prompt, images=(Image(picture),)),))


@cache
def grey() -> bytes:
    """A picture on which there is nothing, as a PNG."""
    import PIL.Image  # imported here: only this task needs it

    file = io.BytesIO()
    PIL.Image.new("RGB", (SIZE, SIZE), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


@register("pictures")
def make(options: TaskOptions) -> PicturesTask:
    """Questions about the held-out pictures of the world that the model was trained on."""
    return PicturesTask(find_world(options).seed)
