"""The task `choices`: what is scored of a choice, which one wins, and what a user is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.stage_helpers import save_lively_model
from transformers import AutoModelForCausalLM

from minnow.cli import main
from minnow.config import UserError
from minnow.data.questions import Question, parse_question
from minnow.engine.sampling import SamplingParams
from minnow.evaluation import Subject, choices
from minnow.evaluation.choices import (
    ChoicesTask,
    LabelledQuestion,
    encode_endings,
    ending_logprobs,
    labelled_questions,
)
from minnow.model.pretrained import load_pretrained
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.train import train_tokenizer

QUESTIONS = [
    {"question": "What swims?", "choices": ["the little minnow", "a stone", "no"], "answer": 0},
    {"question": "谁在池塘里游泳？", "A": "小鱼", "B": "：小鱼游泳", "C": "石", "answer": "A"},
    {"context_options": ["The minnow saw the pond, so the minnow", "The minnow swam, so the pond"], "gold": 0}
    | {"continuation": "swims in it."},
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = save_lively_model(tmp_path_factory.mktemp("model"), context=96)
    return Subject(load_pretrained(folder), Tokenizer.from_pretrained(folder))


def asked(row: dict[str, Any]) -> LabelledQuestion:
    return LabelledQuestion(parse_question(row), "file")


@torch.no_grad()
def test_a_choice_is_as_likely_as_transformers_has_it(tmp_path: Path) -> None:
    """One sequence at a time, straight from the definition: log p(start, context, ending) without the shared part."""
    folder = save_lively_model(tmp_path, context=96)
    subject = Subject(load_pretrained(folder), Tokenizer.from_pretrained(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = subject.tokenizer
    rows = [asked(row) for row in QUESTIONS]
    winners = []
    for row, score in zip(rows, ChoicesTask(rows).score_rows(subject, rows), strict=True):
        question = row.question
        expected = []
        for context, ending in zip(question.contexts, question.endings, strict=True):
            ids = [tokenizer.start_id, *tokenizer.encode(context + ending)]
            start = 1 + min(
                next(n for n, pair in enumerate(zip([*a, None], b, strict=False)) if pair[0] != pair[1])
                for a, b in (
                    (tokenizer.encode(c), tokenizer.encode(c + e))
                    for c, e in zip(question.contexts, question.endings, strict=True)
                    if c == context
                )
            )
            logprobs = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected.append(sum(float(logprobs[place - 1, ids[place]]) for place in range(start, len(ids))))
        assert score.details["logprobs"] == pytest.approx(expected, rel=1e-4)
        per_byte = [v / len(e.strip().encode()) for v, e in zip(expected, question.endings, strict=True)]
        winners.append(per_byte.index(max(per_byte)))
        assert score.value == (winners[-1] in question.right)


def test_all_choices_behind_one_context_are_scored_from_the_same_token() -> None:
    """A tokenizer joins the colon with what often follows it; of the other choice the colon must be scored as well."""
    tokenizer = train_tokenizer(["答案：小鱼"] * 20, 320)
    question = Question(("答案：", "答案："), ("小鱼", "石"), (0,))
    joined, apart = (len(tokenizer.encode("答案：" + ending)) for ending in question.endings)
    assert joined == len(tokenizer.encode("答案：")) < apart, "or nothing reaches over the border"
    endings = encode_endings(tokenizer, LabelledQuestion(question, "file"), 96)
    scored = [tokenizer.decode(ending.ids[ending.start :]) for ending in endings]
    assert scored == ["：小鱼", "：石"]


@pytest.mark.parametrize(
    ("logprobs", "right", "value"),
    [
        ([-4.0, -6.0], (0,), 0.0),
        ([-4.0, -6.0], (1,), 1.0),
        ([-4.0, -8.0], (0,), 0.5),
        ([-4.0, -8.1], (0,), 1.0),
        ([-4.0, -6.0], (0, 1), 1.0),
        ([-4.0, -8.0], (0, 1), 1.0),
    ],
)
def test_the_likeliest_choice_per_byte_wins_and_equal_ones_share(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, logprobs: list[float], right: tuple[int, ...], value: float
) -> None:
    monkeypatch.setattr(choices, "ending_logprobs", lambda *_: [(logprob, False) for logprob in logprobs])
    rows = [LabelledQuestion(Question(("pond", "pond"), (" 小", " minnow"), right), "file")]  # 3 and 6 bytes
    (score,) = ChoicesTask(rows).score_rows(subject, rows)
    assert score.value == value


def test_a_text_is_completed_where_every_token_is_the_likeliest(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "LOGITS_AT_ONCE", 2)
    tokenizer = subject.tokenizer
    context = tokenizer.encode("the little minnow")
    prompt = [tokenizer.start_id, *context]

    def likeliest_behind(ids: list[int]) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        return list(subject.engine.generate([ids], params)[0].completions[0].ids)

    likeliest = likeliest_behind(prompt)
    wrong_end, wrong_start = [*likeliest[:-1], likeliest[-1] ^ 1], [likeliest[0] ^ 1]
    wrong_start += likeliest_behind([*prompt, *wrong_start])  # all but the first
    endings = [choices.Ending([*prompt, *ids], len(prompt)) for ids in (likeliest, wrong_end, wrong_start)]
    assert [completed for _, completed in ending_logprobs(subject.model, endings)] == [True, False, False]
    row = LabelledQuestion(parse_question({"context": "the little", "continuation": "minnow"}), "file")
    assert ChoicesTask([row]).figure(row) == "completed/file"


def test_a_long_context_loses_its_beginning_and_a_long_choice_is_refused(subject: Subject) -> None:
    long = {"query": "the pond " * 200 + "has", "choices": ["a minnow", "a stone"], "gold": 0}
    endings = encode_endings(subject.tokenizer, asked(long), 96)
    for ending, text in zip(endings, ("a minnow", "a stone"), strict=True):
        assert len(ending.ids) == 97  # the last one is only predicted
        assert subject.tokenizer.decode(ending.ids[1:]).endswith(f"pond has {text}")
        assert subject.tokenizer.decode(ending.ids[ending.start :]) == f" {text}"
    assert ChoicesTask([asked(long)]).score_rows(subject, [asked(long)])
    choice = max(len(ending.ids) - ending.start for ending in endings)
    assert encode_endings(subject.tokenizer, asked(long), choice)  # nothing is left of the context
    with pytest.raises(UserError, match=f"of {choice} tokens does not fit .* of {choice - 1}:"):
        encode_endings(subject.tokenizer, asked(long), choice - 1)
    told = r"file: a choice of \d+ tokens does not fit into the model's context of 96: ' the pond the pond"
    with pytest.raises(UserError, match=told):
        encode_endings(subject.tokenizer, asked(long | {"choices": ["pond", "the pond " * 200]}), 96)


def test_scores_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    folder = save_lively_model(tmp_path, context=96)
    model = load_pretrained(folder)
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    rows = [asked(QUESTIONS[0])]
    with pytest.raises(UserError, match="not numbers"):
        ChoicesTask(rows).score_rows(Subject(model, Tokenizer.from_pretrained(folder)), rows)


def test_batches_change_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [asked(row) for row in QUESTIONS]
    together = [score.details["logprobs"] for score in ChoicesTask(rows).score_rows(subject, rows)]
    monkeypatch.setattr(choices, "BATCH_TOKENS", 1)
    monkeypatch.setattr(choices, "LOGITS_AT_ONCE", 2)
    apart = [score.details["logprobs"] for score in ChoicesTask(rows).score_rows(subject, rows)]
    for first, second in zip(together, apart, strict=True):
        assert first == pytest.approx(second, rel=1e-5)


def test_solved_questions_stand_in_front_of_each_but_never_itself(tmp_path: Path) -> None:
    """As lm-evaluation-harness's sampler `first_n` takes them, with its empty line between."""
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*QUESTIONS, QUESTIONS[0]]))
    other.write_text(json.dumps({"goal": "To swim", "sol1": "sink", "sol2": "move", "label": 1}) + "\n")
    solved = [
        "Question: What swims?\nAnswer: the little minnow",
        "问题：谁在池塘里游泳？\n答案：小鱼",
        "The minnow saw the pond, so the minnow swims in it.",
    ]
    plain = [asked(row).question for row in QUESTIONS]
    shown = [[1, 2], [0, 2], [0, 1], [1, 2]]  # the last row is the first one again, which would give it away
    for rows, examples in ((labelled_questions([str(file)], 2), shown), (labelled_questions([str(file)]), [[]] * 4)):
        for row, question, places in zip(rows, [*plain, plain[0]], examples, strict=True):
            fronts = [solved[place] + "\n\n" for place in places]
            assert row.question.contexts == tuple("".join(fronts) + context for context in question.contexts)
            assert (row.question.endings, row.question.right) == (question.endings, question.right)
    first, *_ = labelled_questions([str(file)], 1, str(other))
    assert first.question.contexts[0] == "Question: To swim\nAnswer: move\n\nQuestion: What swims?\nAnswer:"
    with pytest.raises(UserError, match=r"b.jsonl: 1 questions to show in front of another one, but --shots is 2"):
        labelled_questions([str(file)], 2, str(other))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(save_lively_model(tmp_path / "model", context=96))
    first, second = tmp_path / "swims.jsonl", tmp_path / "completes.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    second.write_text(json.dumps({"context": "the little", "continuation": "minnow"}) + "\n")
    arguments = ["eval", folder, "--tasks", "choices", "--device", "cpu"]
    out, rows = tmp_path / "out.json", tmp_path / "rows.jsonl"
    files = ["--choices", f"{first},{second}", "--json", str(out), "--rows", str(rows)]
    assert main([*arguments, *files]) == 0
    figures = json.loads(out.read_text())["tasks"]["choices"]["figures"]
    assert {name: figure["rows"] for name, figure in figures.items()} == {
        "accuracy/swims.jsonl": 3,
        "completed/completes.jsonl": 1,
    }
    assert [len(json.loads(line)["logprobs"]) for line in rows.read_text().splitlines()] == [3, 3, 2, 1]
    capsys.readouterr()
    shown = tmp_path / "shown.jsonl"
    assert main([*arguments, "--choices", str(first), "--shots", "1", "--rows", str(shown)]) == 0
    contexts = [json.loads(line)["context"] for line in shown.read_text().splitlines()]
    assert contexts[1] == "Question: What swims?\nAnswer: the little minnow\n\n问题：谁在池塘里游泳？\n答案："
    capsys.readouterr()
    assert main(arguments) != 0
    assert "--choices FILE" in capsys.readouterr().err
    for wrong, told in (
        (["--shots", "-1"], "--shots -1: give 0 or more"),
        (["--shots_from", str(second)], "--shots_from is read only with --shots"),
    ):
        assert main([*arguments, "--choices", str(first), *wrong]) != 0
        assert told in capsys.readouterr().err
    assert main(["eval", folder, "--tasks", "bpb", "--text", str(second), "--shots", "1"]) != 0
    assert "--shots is read only by choices" in capsys.readouterr().err
    first.write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(QUESTIONS[0] | {"answer": 7}) + "\n")
    assert main([*arguments, "--choices", str(first)]) != 0
    assert "swims.jsonl:2: the right answer is 7" in capsys.readouterr().err
