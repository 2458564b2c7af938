"""Evaluation texts inside longer documents: found where they are, and nowhere else."""

import json
import random

import numpy as np
import pytest

from minnow.config import UserError
from minnow.data.decontamination import EvaluationSets, _hashes

WORDS = [
    f"{a}{b}" for a in ("ba", "co", "du", "fi", "ge", "hu", "ji") for b in ("lan", "mor", "nis", "rup", "sek", "tov")
]
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def sentence(rng, count, zh=False):
    return ("" if zh else " ").join(rng.choice(HAN if zh else WORDS) for _ in range(count))


def sets(tmp_path, rows, name="eval.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return EvaluationSets([str(path)]), path


@pytest.mark.parametrize("zh", [False, True])
def test_a_planted_example_is_found_and_the_others_stay(tmp_path, zh):
    rng = random.Random(0)
    length = 40 if zh else 25
    questions = [sentence(rng, length, zh) for _ in range(200)]
    evaluation, path = sets(tmp_path, [{"query": text, "choices": ["a", "b"], "gold": 1} for text in questions])
    assert evaluation.examples == 200
    assert evaluation.short == 400  # the options
    assert not any(evaluation.find(sentence(rng, 800, zh)) for _ in range(100))
    before, after = sentence(rng, 300, zh), sentence(rng, 300, zh)
    for number in (0, 57, 199):
        found = evaluation.find(f"{before} {questions[number]} {after}")
        assert found.example == f"{path}:{number + 1}"
        assert found.share == 1
    # half of it is still 13 words (20 characters) in a row; a change every 13th word (20th character) leaves none
    half = questions[3][:20] if zh else " ".join(questions[3].split(" ")[:13])
    assert evaluation.find(f"{before} xx {half} xx {after}").share == pytest.approx(
        1 / (length - (20 if zh else 13) + 1)
    )
    parts = list(questions[4]) if zh else questions[4].split(" ")
    step = 20 if zh else 13
    parts[step - 1 :: step] = ["changed"] * len(parts[step - 1 :: step])
    assert evaluation.find(("" if zh else " ").join([before, *parts, after])) is None


def test_case_punctuation_and_lines_do_not_hide_it(tmp_path):
    question = "Which of the two otters, at the old mill, ate the fish that the heron had caught?"
    evaluation, _ = sets(tmp_path, [{"question": question}])
    hidden = "which OF the\ntwo otters at the old mill ate - the fish that the heron had caught"
    assert evaluation.find(f"He asked: {hidden}").words == "which of the two otters at the old mill ate the fish that"


def test_short_examples_must_stand_there_whole(tmp_path):
    """Nine words: looked for as a whole. Seven: too short to mean anything."""
    evaluation, _ = sets(
        tmp_path, [{"a": "one two three four five six seven eight nine", "b": "this one is too short to matter"}]
    )
    assert (evaluation.examples, evaluation.short) == (1, 1)
    assert evaluation.find("zero one two three four five six seven eight nine ten").share == 1
    assert evaluation.find("one two three four five six seven eight") is None
    assert evaluation.find("this one is too short to matter") is None


def test_forms_that_many_examples_share_are_no_example(tmp_path):
    form = "Read the text below with care, then choose the one answer that fits best of all:"
    rng = random.Random(1)
    rows = [{"query": f"{form} {sentence(rng, 20)}"} for _ in range(11)]
    evaluation, _ = sets(tmp_path, rows)
    assert evaluation.find(f"{form} what a fine day it is today, is it not, my dear old friend?") is None
    assert evaluation.find(rows[10]["query"]).share == 1
    few, _ = sets(tmp_path, rows[:10])
    assert few.find(f"{form} what a fine day") is not None


def test_nested_texts_count_and_copies_of_an_example_count_once(tmp_path):
    text = "the quick brown fox jumps over the lazy dog near the old stone bridge"
    rows = [{"function": [{"description": text}], "n": number} for number in range(30)]
    evaluation, path = sets(tmp_path, rows)
    assert evaluation.examples == 1
    assert evaluation.find(f"and {text} again").example == f"{path}:1"


def test_one_chinese_word_does_not_make_a_text_chinese(tmp_path):
    """Nine words are looked for; of a Chinese text twelve characters would be needed."""
    text = "one two three four five six seven eight 鱼"
    evaluation, _ = sets(tmp_path, [{"q": text}])
    assert evaluation.examples == 1
    assert evaluation.find(f"zero {text} ten").share == 1


def test_the_example_that_stands_there_most_completely_is_named(tmp_path):
    """Three pieces of a long one weigh less than the whole of a short one."""
    evaluation, path = sets(tmp_path, [{"q": " ".join(WORDS[:30])}, {"q": " ".join(WORDS[30:40])}])
    found = evaluation.find(" ".join([*WORDS[:15], "between", *WORDS[30:40]]))
    assert (found.example, found.share) == (f"{path}:2", 1)


def test_nothing_to_look_for_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing to look for"):
        sets(tmp_path, [{"query": "too short"}])


def test_hashes_differ_where_runs_differ():
    """All runs of 3 of 6 words: equal hashes exactly for equal runs."""
    ids = np.array([[a, b, c] for a in range(6) for b in range(6) for c in range(6)], np.uint64)
    hashes = np.concatenate([_hashes(row, 3) for row in ids])
    assert len(np.unique(hashes)) == 6**3
    assert _hashes(np.array([1, 2], np.uint64), 3).shape == (0,)
    assert np.array_equal(
        _hashes(np.array([9, 1, 2, 3, 9], np.uint64), 3)[1:2], _hashes(np.array([1, 2, 3], np.uint64), 3)
    )
