import itertools
import re

import pytest

from minnow.data.pond.arithmetic import Problem, arithmetic_conversations, problems, split_of
from minnow.data.pond.relations import LANGUAGES
from minnow.data.pond.world import World


@pytest.fixture(scope="module")
def world():
    return World.generate(seed=0)


@pytest.mark.parametrize(
    ("a", "sign", "b", "steps"),
    [
        (47, "+", 38, "Ones: 7 + 8 = 15. Tens: 4 + 3 + 1 = 8. So 47 + 38 = 85."),
        (48, "+", 53, "Ones: 8 + 3 = 11. Tens: 4 + 5 + 1 = 10. So 48 + 53 = 101."),
        (41, "+", 38, "Ones: 1 + 8 = 9. Tens: 4 + 3 = 7. So 41 + 38 = 79."),
        (52, "-", 17, "Ones: 12 - 7 = 5. Tens: 5 - 1 - 1 = 3. So 52 - 17 = 35."),
        (59, "-", 50, "Ones: 9 - 0 = 9. Tens: 5 - 5 = 0. So 59 - 50 = 9."),
    ],
)
def test_steps(a, sign, b, steps):
    assert Problem("en", a, sign, b, "").steps == steps


def test_every_equation_in_the_steps_holds():
    for a, b, sign in itertools.product(range(10, 100), range(10, 100), "+-"):
        if sign == "-" and a < b:
            continue
        problem = Problem("zh", a, sign, b, "")
        equations = re.findall(r"([\d +-]+) = (\d+)", problem.steps)
        assert len(equations) == 3
        for left, right in equations:
            terms = re.findall(r"[+-]?\d+", left.replace(" ", ""))
            assert sum(map(int, terms)) == int(right) >= 0
        assert equations[-1][1] == str(problem.result) == re.search(r"\d+", problem.answer)[0]


def test_held_out_numbers_are_in_no_training_row(world):
    seen = 0
    for conversation in arithmetic_conversations(world, 3000):
        numbers = re.findall(r"\d+", conversation.messages[0].content)
        if len(numbers) == 2:
            seen += 1
            result = int(re.search(r"\d+", conversation.messages[1].content)[0])
            sign = "+" if result == sum(map(int, numbers)) else "-"
            assert split_of(int(numbers[0]), sign, int(numbers[1])) == "training"
    assert seen > 2000
    assert split_of(31, "+", 47) == split_of(47, "+", 31)
    for language in LANGUAGES:
        held_out = list(itertools.islice(problems(world, "held_out", language), 50))
        assert all(split_of(p.a, p.sign, p.b) == "held_out" for p in held_out)


def test_half_of_the_exercises_show_steps(world):
    rows = list(arithmetic_conversations(world, 2000, replay=0.0))
    share = sum(row.messages[1].reasoning_content is not None for row in rows) / len(rows)
    assert 0.45 < share < 0.55


def test_a_fifth_of_the_conversations_are_ordinary_ones(world):
    """So that a model goes on knowing the pond. They have no numbers."""
    rows = list(arithmetic_conversations(world, 2000))
    ordinary = sum(not re.search(r"\d", row.messages[-1].content) for row in rows)
    assert 0.17 < ordinary / len(rows) < 0.23


@pytest.mark.parametrize(
    ("a", "sign", "b", "steps", "result"),
    [
        (47, "+", 38, "Ones: 7 + 8 = 15. Tens: 4 + 3 = 7. So 47 + 38 = 75.", 75),
        (52, "-", 17, "Ones: 12 - 7 = 5. Tens: 5 - 1 = 4. So 52 - 17 = 45.", 45),
        (41, "+", 38, "Ones: 1 + 8 = 9. Tens: 4 + 3 = 7. So 41 + 38 = 79.", 79),  # nothing to forget
    ],
)
def test_a_forgetful_pupil(a, sign, b, steps, result):
    assert Problem("en", a, sign, b, "").working(forgetful=True) == (steps, result)


def test_carries_are_forgotten_as_often_as_said_and_nothing_else(world):
    carried, forgotten = 0, 0
    for row in arithmetic_conversations(world, 3000, thinking=1.0, replay=0.0, forgetful=0.6):
        a, sign, b, said = re.search(r"(\d+) ([+-]) (\d+) = (\d+)[.。]$", row.messages[1].reasoning_content).groups()
        problem = Problem("en", int(a), sign, int(b), "")
        assert re.search(r"\d+", row.messages[1].content)[0] == said
        if problem.carries:
            carried += 1
            forgotten += int(said) != problem.result
        else:
            assert int(said) == problem.result
    assert 0.35 < carried / 3000 < 0.55
    assert 0.55 < forgotten / carried < 0.65
