"""The task `identity`: does an adapter answer for the persona that it was trained on?"""

from __future__ import annotations

from collections.abc import Sequence

from minnow.data.pond.identity import IdentityQuestion, identity_questions
from minnow.data.pond.questions import normal_form
from minnow.data.pond.relations import LANGUAGES
from minnow.evaluation.registry import GenerationTask, Score, Task, TaskOptions, register
from minnow.tokenizer.chat import Conversation, Message


class IdentityTask(GenerationTask[IdentityQuestion]):
    """Exact match of the answer, after `normal_form`, on wordings that stand in no training text."""

    name = "identity"
    max_tokens = 48

    def rows(self) -> Sequence[IdentityQuestion]:
        """Every unseen wording, in both languages."""
        return [row for language in LANGUAGES for row in identity_questions(language, "unseen")]

    def figure(self, row: IdentityQuestion) -> str:
        """By language."""
        return f"exact_match/{row.language}"

    def prompt(self, row: IdentityQuestion) -> Conversation:
        """The question alone."""
        return Conversation((Message("user", row.prompt),))

    def score(self, row: IdentityQuestion, answer: str) -> Score:
        """1 for the persona's sentence, 0 for any other."""
        details = {"prompt": row.prompt, "answer": answer, "expected": row.answer, "fact": row.fact}
        return Score(float(normal_form(answer) == normal_form(row.answer)), details=details)


@register("identity")
def make(options: TaskOptions) -> Task[IdentityQuestion]:
    """Questions to the persona of the pond's `identity.jsonl`."""
    return IdentityTask()
