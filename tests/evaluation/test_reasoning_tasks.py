"""The tasks `identity` and `arithmetic`: what counts as right, and what counts as the format."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from minnow.data.pond.arithmetic import Problem, split_of
from minnow.data.pond.identity import identity_questions
from minnow.data.pond.relations import LANGUAGES
from minnow.data.pond.world import World
from minnow.engine.outputs import Completion, Completions
from minnow.evaluation import TaskOptions, make_tasks
from minnow.evaluation.arithmetic import ArithmeticTask, has_format
from minnow.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["Ones: 7 + 8 = 15. Tens: 4 + 3 + 1 = 8. The answer is 85."] * 4, 330)


def ids_of(text: str) -> list[int]:
    """§...§ marks control tokens."""
    ids: list[int] = []
    for i, part in enumerate(text.split("§")):
        ids += [TOKENIZER.special_ids[part]] if i % 2 else TOKENIZER.encode(part)
    return ids


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("steps\n§</think>§\n\nIt is 5.§<|im_end|>§", True, True),
        ("§</think>§\n\nIt is 5.§<|im_end|>§", True, False),  # no reasoning
        ("steps\n§</think>§\n\n§<|im_end|>§", True, False),  # no answer
        ("steps\n§</think>§\n\nIt is 5.", True, False),  # cut off
        ("§<think>§\nsteps\n§</think>§\n\nIt is 5.§<|im_end|>§", True, False),  # opened twice
        ("steps\n§</think>§\n\nIt </think> is 5.§<|im_end|>§", True, False),  # spelled out
        ("steps <|im_end|>\n§</think>§\n\nIt is 5.§<|im_end|>§", True, False),  # so too among the thoughts
        ("It is 5.§<|im_end|>§", False, True),
        ("steps\n§</think>§\n\nIt is 5.§<|im_end|>§", False, False),
        ("It is <think> 5.§<|im_end|>§", False, False),
        ("§<|im_end|>§", False, False),
    ],
)
def test_format(text: str, thinking: bool, expected: bool) -> None:
    assert has_format(TOKENIZER, ids_of(text), thinking=thinking) == expected


class Engine:
    """Right with thinking but for the full stop, wrong without, and it leaks a tag without."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def generate(self, prompts, params):
        assert params.temperature == 0
        results = []
        for prompt in prompts:
            text = TOKENIZER.decode(prompt)
            answer = next(answer for question, answer in self.answers.items() if question in text).rstrip(".。")
            thinking = text.endswith("<think>\n")
            ids = ids_of(f"7 + 8\n§</think>§\n\n{answer}§<|im_end|>§" if thinking else "§</think>§0§<|im_end|>§")
            done = Completion(ids=ids, text="", finish_reason="stop", logprobs=None, raw_logprobs=None)
            results.append(Completions(prompt_ids=prompt, completions=(done,), seed=0))
        return results


def test_arithmetic_figures() -> None:
    task = ArithmeticTask(World.generate(seed=0), count=20)
    answers = {row.problem.prompt: row.problem.answer for row in task.rows()}
    subject = SimpleNamespace(tokenizer=TOKENIZER, engine=Engine(answers))
    means: dict[str, list[float]] = {}
    for row, score in zip(task.rows(), task.score_rows(subject, task.rows()), strict=True):
        means.setdefault(task.figure(row), []).append(score.value)
    assert {name: sum(values) / len(values) for name, values in means.items()} == {
        "accuracy/thinking_on": 1.0,
        "format/thinking_on": 1.0,
        "accuracy/thinking_off": 0.0,
        "format/thinking_off": 0.0,
    }


def test_arithmetic_asks_held_out_sums_in_both_languages() -> None:
    """Sums of the training split measure what was learnt by heart."""
    rows = ArithmeticTask(World.generate(seed=0), count=20).rows()
    assert len(rows) == 4 * 20
    asked = {row.problem for row in rows}
    assert Counter(problem.language for problem in asked) == {"en": 10, "zh": 10}
    assert {split_of(problem.a, problem.sign, problem.b) for problem in asked} == {"held_out"}


def test_the_longest_working_fits_into_an_answer() -> None:
    """Even at a token for each byte: an answer that is cut off would count as wrong."""
    for language in LANGUAGES:
        said = [Problem(language, 99, "+", 98, ""), Problem(language, 91, "-", 19, "")]
        assert all(len((each.steps + each.answer).encode()) + 6 <= ArithmeticTask.max_tokens for each in said)


def test_identity_asks_in_both_languages() -> None:
    (task,) = make_tasks("identity", TaskOptions())
    assert {task.figure(row) for row in task.rows()} == {"exact_match/en", "exact_match/zh"}


def test_identity_asks_unseen_wordings_only() -> None:
    (task,) = make_tasks("identity", TaskOptions())
    rows = task.rows()
    assert not {row.prompt for row in rows} & {row.prompt for row in identity_questions("en", "trained")}
    assert task.score(rows[0], rows[0].answer.upper().rstrip(".")).value == 1.0
    assert task.score(rows[0], "I am Minnow.").value == 0.0
