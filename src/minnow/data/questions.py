"""Questions with answers to choose from, and texts to complete, as public benchmarks write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minnow.data.values import RowError

_LETTERS = tuple("ABCDEFGHIJ")
_LETTER_IN_FRONT = re.compile(r"^\s*[(（]?[A-J][)）.．、:：]\s*")
_HAN = re.compile(r"[\u4e00-\u9fff]")
_WIDE = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]$")
"""A character behind which no space stands: Chinese, Japanese, full-width."""


@dataclass(frozen=True)
class Question:
    """What stands before each choice, the choices, and which one is right."""

    contexts: tuple[str, ...]
    """One a choice; all the same but where the choice stands in the middle of a sentence (Winograd's schemas)."""
    endings: tuple[str, ...]
    """The texts to compare, the space in front of them included. A single one is a text to complete word for word."""
    right: tuple[int, ...]
    """Which of them are right, mostly one."""

    @property
    def is_completion(self) -> bool:
        """Whether there is nothing to choose from."""
        return len(self.endings) == 1

    @property
    def solved(self) -> str:
        """The text with its right ending, the first of several."""
        return self.contexts[self.right[0]] + self.endings[self.right[0]]


def parse_question(row: Mapping[str, Any]) -> Question:
    """Read a row in any of these forms; the right answer is the choice's own label, a letter or an index from 0, or a
    list of them where several are right (AGIEval):

    - `query`, `choices`, `gold`; `context_options`, `continuation`, `gold`; `context`, `continuation` (llm-foundry);
    - `question`, `choices` (a list, or `text` and `label` lists), `answer` or `answerKey` (MMLU, ARC, CommonsenseQA);
    - `question`, `options` (perhaps "(A)..."), `label` or `answer` (AGIEval, MMLU-Pro, RACE);
    - `question`, `A`, `B`, ..., `answer`, also capitalised (C-Eval, CMMLU);
    - `ctx`, `endings`, `label` (HellaSwag); `goal`, `sol1`, `sol2`, `label` (PIQA); `sentence` with a `_`, `option1`,
      `option2`, `answer` (WinoGrande).

    A `question`, behind its `passage`, `article` or `context` if it has one, and a `goal` are put as
    "Question: ...\\nAnswer:", or in Chinese if they have Chinese characters; the other forms are contexts in their own
    words, but a query whose last line begins with "Question:" gets its "Answer:".
    Raises RowError.
    """
    if "context_options" in row:
        contexts, ending = _texts(row, "context_options"), _text(row, "continuation")
        return _question(contexts, [ending] * len(contexts), row.get("gold"))
    if "query" in row:
        return _one_context(_with_answer(_text(row, "query")), _texts(row, "choices"), row.get("gold"))
    if "endings" in row:
        return _one_context(_text(row, "ctx"), _texts(row, "endings"), row.get("label"))
    if "sol1" in row:
        return _one_context(_asked(_text(row, "goal")), [_text(row, key) for key in ("sol1", "sol2")], row.get("label"))
    if "option1" in row:
        before, blank, after = _text(row, "sentence").partition("_")
        if not blank or not after.strip():
            raise RowError("`sentence` has no _ with text behind it, in whose place the options stand")
        options = [before + _text(row, key) for key in ("option1", "option2")]
        return _question(options, [after] * 2, row.get("answer"), labels=("1", "2"))
    if "context" in row and "continuation" in row:
        return _question([_text(row, "context")], [_text(row, "continuation")], 0)
    row = {key.lower() if key in ("Question", "Answer") else key: value for key, value in row.items()}
    if "question" not in row:
        raise RowError("no question to examine: docs/evaluation.md lists the forms of rows that are read")
    return _asked_question(row)


def _asked_question(row: Mapping[str, Any]) -> Question:
    passage = [_text(row, key) for key in ("passage", "article", "context") if row.get(key)]
    context = _asked("\n".join([*passage, _text(row, "question")]))
    choices = row.get("choices")
    if isinstance(choices, Mapping):
        labels = _LETTERS if choices.get("label") is None else _texts(choices, "label")
        return _one_context(context, _texts(choices, "text"), row.get("answerKey", row.get("answer")), labels)
    if choices is not None:
        return _one_context(context, _texts(row, "choices"), row.get("answer", row.get("answerKey")))
    if "options" in row:
        return _one_context(context, _without_letters(_texts(row, "options")), row.get("label", row.get("answer")))
    letters = [letter for letter in _LETTERS if row.get(letter) is not None]
    return _one_context(context, [_text(row, letter) for letter in letters], row.get("answer"), letters)


def _without_letters(options: Sequence[str]) -> list[str]:
    """The options without the letters in front, if half of them have one: a single "D.C." is none. Not all of them, and
    not in order, for AGIEval has a slip of the pen in one row of a hundred."""
    lettered = sum(bool(_LETTER_IN_FRONT.match(option)) for option in options)
    if lettered < max(2, len(options) / 2):
        return list(options)
    return [_checked(_LETTER_IN_FRONT.sub("", option), "options") for option in options]


def _asked(question: str) -> str:
    return f"问题：{question.strip()}\n答案：" if _HAN.search(question) else f"Question: {question.strip()}\nAnswer:"


def _with_answer(query: str) -> str:
    last = query.rstrip().rpartition("\n")[2]
    return query.rstrip() + "\nAnswer:" if last.startswith("Question:") else query


def _one_context(context: str, choices: Sequence[str], right: Any, labels: Sequence[str] = _LETTERS) -> Question:
    if len(choices) < 2:
        raise RowError("a question needs two choices or more")
    return _question([context] * len(choices), choices, right, labels=labels)


def _question(
    contexts: Sequence[str], endings: Sequence[str], right: Any, *, labels: Sequence[str] = _LETTERS
) -> Question:
    contexts = tuple(context.rstrip() for context in contexts)
    gaps = ["" if not context or _WIDE.search(context) else " " for context in contexts]
    joined = tuple(gap + ending.strip() for gap, ending in zip(gaps, endings, strict=True))
    every = right if isinstance(right, list) and right else [right]
    return Question(contexts, joined, tuple(_index(each, labels[: len(endings)], len(endings)) for each in every))


def _index(right: Any, labels: Sequence[str], count: int) -> int:
    if isinstance(right, str | int) and not isinstance(right, bool):
        written = str(right).strip()
        if written in labels:
            return list(labels).index(written)
        if written.isdecimal() and len(written) < 3 and int(written) < count:
            return int(written)
    raise RowError(
        f"the right answer is {right!r}: it must be one of the {count} choices, as an index from 0 or a letter"
    )


def _texts(row: Mapping[str, Any], key: str) -> list[str]:
    value = row.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(f"`{key}` must be a list of texts")
    return [_checked(item, key) for item in value]


def _text(row: Mapping[str, Any], key: str) -> str:
    return _checked(row.get(key), key)


def _checked(value: Any, key: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # choices that are numbers
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"`{key}` must be a text that is not empty")
    return value
