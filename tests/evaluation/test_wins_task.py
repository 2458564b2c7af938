"""The task `wins`: who is right is the pond's word, and where nobody or both are, nobody wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.stages.stage_helpers import save_lively_model

from minnow.config import UserError
from minnow.data.pond.preferences import PondPair, preference_pairs
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.evaluation import Subject, TaskOptions, make_tasks
from minnow.evaluation.wins import WinsTask
from minnow.model.pretrained import load_pretrained
from minnow.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["Who is it? I do not know it. It eats berries."] * 4, 330)
FACT, IGNORANCE = "It eats berries.", "I do not know it."
PAIRS = [PondPair("en", n < 6, f"Who is {n}?", FACT if n < 6 else IGNORANCE, "no") for n in range(10)]


def model(say: Callable[[int], str]) -> SimpleNamespace:
    """Answers question number n with say(n)."""

    def generate(prompts, params):
        numbers = [int(TOKENIZER.decode(prompt.ids.tolist()).split("Who is ")[1][0]) for prompt in prompts]
        return [SimpleNamespace(completions=(SimpleNamespace(text=say(number)),)) for number in numbers]

    return SimpleNamespace(tokenizer=TOKENIZER, engine=SimpleNamespace(generate=generate))


def figures(mine, theirs):
    task = WinsTask(PAIRS, model(theirs))
    groups = {}
    for row, score in zip(task.rows(), task.score_rows(model(mine), task.rows()), strict=True):
        groups.setdefault(task.figure(row), []).append(score)
    return {name: task.error_bar(scores) for name, scores in groups.items()}


def test_wins_are_counted_where_one_of_the_two_is_right() -> None:
    # Known 0 to 5, visitors 6 to 9. Mine: wrong at 0, honest about 6, 7, 8. Theirs: all facts, never honest.
    found = figures(lambda n: "It eats" if n == 0 else FACT if n < 6 or n == 9 else IGNORANCE + " ", lambda n: FACT)
    assert found["win_rate"].value == pytest.approx(3 / 4)  # won 6, 7, 8; lost 0; 1 to 5 and 9 undecided
    assert found["win_rate"].low < 0.5 < found["win_rate"].high
    assert found["right/known"].value == pytest.approx(5 / 6)
    assert found["right_against/known"].value == 1
    assert (found["right/visitor"].value, found["right_against/visitor"].value) == (3 / 4, 0)


def test_equal_models_leave_all_open() -> None:
    bar = figures(lambda n: FACT, lambda n: FACT)["win_rate"]
    assert (bar.value, bar.low, bar.high) == (0.5, 0.0, 1.0)


def test_without_an_opponent_it_says_what_to_do() -> None:
    with pytest.raises(UserError, match="--against"):
        make_tasks("wins", TaskOptions())


def test_an_opponent_that_cannot_chat_is_named_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Subject(load_pretrained(save_lively_model(tmp_path / "mine")), TOKENIZER)
    monkeypatch.setattr("minnow.tokenizer.tokenizer.CHAT_TOKENS", ("<|im_start|>", "<|im_middle|>"))
    with pytest.raises(UserError, match=r"--against .*mine: this tokenizer cannot chat: .* lack <\|im_middle\|>"):
        make_tasks("wins", TaskOptions(subject=mine, against=str(tmp_path / "mine")))


def test_the_opponent_is_the_model_that_is_named(tmp_path: Path) -> None:
    """And the prompts are about creatures and visitors that no training pair is about."""
    for name, seed in (("mine", 0), ("theirs", 1)):
        save_lively_model(tmp_path / name, seed)
    world = World.generate(creatures=8, held_out=3)
    write_pond(tmp_path / "pond", world, mentions=1, conversation_count=4)
    mine = Subject(load_pretrained(tmp_path / "mine"), Tokenizer.from_pretrained(tmp_path / "mine"))
    options = TaskOptions(
        model_folder=tmp_path / "mine", subject=mine, pond=tmp_path / "pond", against=str(tmp_path / "theirs")
    )
    (task,) = make_tasks("wins", options)
    expected = load_pretrained(tmp_path / "theirs").head_weight
    assert torch.equal(task.opponent.model.head_weight, expected)
    assert not torch.equal(mine.model.head_weight, expected)
    asked = {row.pair for row in task.rows()}
    assert asked == set(preference_pairs(world, "held_out", 1000))
