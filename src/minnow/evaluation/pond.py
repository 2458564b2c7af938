"""The task `pond`: does the model answer questions about creatures that it was never asked about?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minnow.config import UserError
from minnow.data.pond.questions import Question, Wording, normal_form, questions
from minnow.data.pond.relations import LANGUAGES
from minnow.data.pond.world import World
from minnow.data.pond.write import load_world
from minnow.evaluation.registry import GenerationTask, Score, Task, TaskOptions, register
from minnow.tokenizer.chat import Conversation, Message


class PondTask(GenerationTask[Question]):
    """Exact match of the whole answer, after `normal_form`, on single-fact questions.

    Figures: `exact_match/LANGUAGE` for wordings that training used (about other creatures), and
    `exact_match_unseen_wording/LANGUAGE` for wordings that it did not.
    """

    name = "pond"
    max_tokens = 32

    def __init__(self, world: World) -> None:
        wordings: tuple[Wording, ...] = ("trained", "unseen")
        self._rows = [
            question
            for wording in wordings
            for language in LANGUAGES
            for question in questions(world, "held_out", wording, language)
        ]

    def rows(self) -> Sequence[Question]:
        """Every held-out creature x nine relations x two languages x two kinds of wording."""
        return self._rows

    def figure(self, row: Question) -> str:
        """By kind of wording and language."""
        name = "exact_match" if row.wording == "trained" else "exact_match_unseen_wording"
        return f"{name}/{row.language}"

    def prompt(self, row: Question) -> Conversation:
        """The question alone, without a system message."""
        return Conversation((Message("user", row.prompt),))

    def score(self, row: Question, answer: str) -> Score:
        """1 for the right sentence, 0 for any other."""
        details = {"prompt": row.prompt, "answer": answer, "expected": row.answer, "relation": row.relation}
        return Score(float(normal_form(answer) == normal_form(row.answer)), details=details)


def find_world(options: TaskOptions) -> World:
    """The world of `options.pond`, else of a folder `pond` in the model's folder or run. UserError without any."""
    if options.pond is not None:
        return load_world(options.pond)
    folder = options.model_folder
    candidates: list[Path] = [] if folder is None else [folder / "pond", folder.parent / "pond"]
    for candidate in candidates:
        if (candidate / "world.json").is_file():
            return load_world(candidate)
    raise UserError(
        "no pond beside the model: say --pond DIR (`minnow data pond --out DIR` makes one); of a model that learnt "
        "other texts: --tasks bpb --text FILE"
    )


@register("pond")
def make(options: TaskOptions) -> Task[Question]:
    """Questions about the held-out creatures of the world that the model was trained on."""
    return PondTask(find_world(options))
