"""Rows of public benchmarks: what is asked, what there is to choose from, what is right."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from minnow.data.questions import Question, parse_question
from minnow.data.readers import read_rows
from minnow.data.values import RowError

ASKED = ("Question: What swims?\nAnswer:",) * 2
TWO = (" a fish", " a stone")


@pytest.mark.parametrize(
    ("row", "contexts", "endings"),
    [
        ({"query": "Question: What swims?\n", "choices": ["a fish", "a stone"], "gold": 1}, ASKED, TWO),
        (
            {"query": "It swims, so it is", "choices": ["a fish", "a stone"], "gold": 1},
            ("It swims, so it is",) * 2,
            TWO,
        ),
        (
            {"query": "Question: What?\nChoices:\nA. a fish\nB. a stone\nAnswer:", "choices": ["A", "B"], "gold": 1},
            ("Question: What?\nChoices:\nA. a fish\nB. a stone\nAnswer:",) * 2,
            (" A", " B"),
        ),
        (
            {
                "context_options": ["It ate and the fish", "It ate and I"],
                "continuation": "swam.",
                "gold": 1,
            },
            ("It ate and the fish", "It ate and I"),
            (" swam.",) * 2,
        ),
        ({"question": "What swims?", "choices": ["a fish", "a stone"], "answer": 1, "subject": "x"}, ASKED, TWO),
        ({"question": "What swims?", "choices": ["a fish", "a stone"], "answer": "B"}, ASKED, TWO),
        (
            {
                "question": "What swims?",
                "choices": {"text": ["a fish", "a stone"], "label": ["1", "2"]},
                "answerKey": "2",
            },
            ASKED,
            TWO,
        ),
        (
            {"passage": None, "question": "What swims?", "options": ["(A)a fish", "(B)a stone"], "label": "B"},
            ASKED,
            TWO,
        ),
        (
            {"passage": "Read.", "question": "What swims?", "options": ["(A) a fish", "(B) a stone"], "label": "B"},
            ("Question: Read.\nWhat swims?\nAnswer:",) * 2,
            TWO,
        ),
        (
            {"question": "What swims?", "options": ["D.C. United", "a stone"], "label": "B"},
            ASKED,
            (" D.C. United", " a stone"),
        ),
        (
            {"question": "What swims?", "options": ["A a pond", "（B）a fish", "B．a stone", "D? no"], "label": "B"},
            ("Question: What swims?\nAnswer:",) * 4,
            (" A a pond", " a fish", " a stone", " D? no"),
        ),
        (
            {"article": "Read.", "question": "What swims?", "options": ["a fish", "a stone"], "answer": "B"},
            ("Question: Read.\nWhat swims?\nAnswer:",) * 2,
            TWO,
        ),
        (
            {"context": "Read.", "question": "What swims?", "choices": ["a fish", "a stone"], "answer": 1},
            ("Question: Read.\nWhat swims?\nAnswer:",) * 2,
            TWO,
        ),
        (
            {"question": "What swims?", "choices": {"text": ["a fish", "a stone"], "label": [1, 2]}, "answerKey": 2},
            ASKED,
            TWO,
        ),
        ({"question": "What swims?", "choices": {"text": ["a fish", "a stone"]}, "answerKey": "B"}, ASKED, TWO),
        ({"question": "What swims?", "A": "a fish", "B": None, "C": "a stone", "answer": "C"}, ASKED, TWO),
        ({"Question": "What swims?", "A": "a fish", "B": "a stone", "Answer": "B", "": "3"}, ASKED, TWO),
        ({"question": "谁会游泳？", "A": "鱼", "B": 3, "answer": "B"}, ("问题：谁会游泳？\n答案：",) * 2, ("鱼", "3")),
        ({"ctx": "A fish", "endings": ["swims.", "flies."], "label": "1"}, ("A fish",) * 2, (" swims.", " flies.")),
        ({"goal": "What swims?", "sol1": "a fish", "sol2": "a stone", "label": 1}, ASKED, TWO),
        (
            {"sentence": "I ate the fish as _ was big.", "option1": "I", "option2": "the fish", "answer": "2"},
            ("I ate the fish as I", "I ate the fish as the fish"),
            (" was big.",) * 2,
        ),
        (
            {"sentence": "_ was big.", "option1": "I", "option2": "The fish", "answer": 2},
            ("I", "The fish"),
            (" was big.",) * 2,
        ),
    ],
)
def test_every_form_of_a_question(row: dict[str, Any], contexts: tuple[str, ...], endings: tuple[str, ...]) -> None:
    assert parse_question(row) == Question(contexts, endings, (1,))


def test_several_right_answers() -> None:
    row = {"question": "What swims?", "options": ["(A)a fish", "(B)a stone", "(C)a minnow"], "label": ["A", "C"]}
    question = parse_question(row)
    assert question.right == (0, 2)
    assert question.solved == "Question: What swims?\nAnswer: a fish"


def test_a_text_to_complete_has_one_ending() -> None:
    question = parse_question({"context": "25 - 759 =", "continuation": " -734"})
    assert question == Question(("25 - 759 =",), (" -734",), (0,))
    assert question.is_completion


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "no question"}, "no question"),
        ({"question": "What?", "choices": ["a", "b"], "answer": 2}, "right answer is 2"),
        ({"question": "What?", "choices": ["a", "b"], "answer": -1}, "right answer is -1"),
        ({"question": "What?", "choices": ["a", "b"], "answer": True}, "right answer is True"),
        ({"question": "What?", "choices": ["a", "b"], "answer": "C"}, "right answer is 'C'"),
        ({"question": "What?", "choices": ["a", "b"], "answer": ""}, "right answer is ''"),
        ({"question": "What?", "options": ["(A)a", "(B)b"], "label": ["A", "D"]}, "right answer is 'D'"),
        ({"question": "What?", "options": ["(A)a", "(B)b"], "label": []}, "right answer is \\[\\]"),
        ({"question": "What?", "options": ["(A)", "(B)b"], "label": "B"}, "not empty"),
        ({"question": "What?", "choices": {"text": ["a", "b"], "label": 1}, "answerKey": 0}, "list of texts"),
        ({"question": "What?", "choices": ["a"], "answer": 0}, "two choices"),
        ({"question": "What?", "choices": "ab", "answer": 0}, "list of texts"),
        ({"question": "What?", "choices": ["a", " "], "answer": 0}, "not empty"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "not empty"),
        ({"query": "What?", "choices": ["a", "b"]}, "right answer is None"),
        ({"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}, "has no _"),
    ],
)
def test_what_cannot_be_examined_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_question(row)


@pytest.mark.skipif("MINNOW_DATA" not in os.environ, reason="MINNOW_DATA names a folder of public data sets")
@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("en_arc_easy", {3, 4, 5}),  # llm-foundry's files, as the next four
        ("en_piqa", {2}),
        ("en_winogrande", {2}),
        ("en_boolq", {2}),
        ("en_lambada_openai", {1}),
        ("en_mmlu_subset", {4}),
        ("en_agieval_sat_math", {4}),
        ("zh_agieval_gaokao_history", {4}),
        ("zh_agieval_gaokao_physics", {4}),  # with several right answers in some rows
    ],
)
def test_real_rows_are_read(name: str, choices: set[int]) -> None:
    path = Path(os.environ["MINNOW_DATA"]) / "eval" / f"{name}.jsonl.zst"
    questions = [parse_question(row) for _, row in islice(read_rows([str(path)]), 200)]
    assert {len(question.endings) for question in questions} <= choices
    if choices != {1}:
        assert len({question.right for question in questions}) > 1, "the right one is not always the same"
