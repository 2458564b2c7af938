"""Mathematical answers: equal ones are, hostile ones cost bounded time on any thread, and are no silent zeros."""

import logging
import threading

import pytest

from minnow.config import UserError
from minnow.rl.left_out import left_out_figures
from minnow.rl.maths import MathsJudge
from minnow.rl.rewards import RewardConfig, Rewarder
from tests.rl.test_rewards import episode

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def judge():
    return MathsJudge(seconds=20)  # two cores and other tests beside


def test_equal_expressions(judge):
    pairs = [
        (r"So \boxed{\frac{1}{2}}", "0.5"),
        (r"So \boxed{7}", "8"),
        ("$x = 3$", "3"),
        (r"$\sqrt{8}$", r"2\sqrt{2}"),
        ("$2$", r"2\sqrt{2}"),
        ("$x^2$", "x^{2}"),
        ("$2$", "x^{2}"),
        (r"\boxed{72}", "48 + 24 = 72. #### 72"),
        (r"So \boxed{\frac{1}{2}}", "0.5"),
        ("no formula at all", "4"),
        ("\ud800 $4$", "4"),
    ]
    assert judge.compare(pairs) == [True, False, True, True, False, True, False, True, True, False, True]
    assert judge.compare([]) == []
    with pytest.raises(UserError, match="'' is no mathematical expression"):
        judge.compare([("4", "")])
    assert judge.compare([("$4$", "4")]) == [True]


def test_it_works_on_any_thread(judge):
    """math-verify's own time limit is a signal, and raises off the main thread."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(judge.compare([(r"\boxed{\frac12}", "0.5")])))
    thread.start()
    thread.join()
    assert found == [True]


HOSTILE = [
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{2^{1000000000}}",
    r"\boxed{(x+1)^{5000}(x-1)^{5000}}",
    "$" + "(" * 2000 + "1" + ")" * 2000 + "$",
    r"\boxed{" + r"\frac{1}{" * 300 + "2" + "}" * 300 + "}",
]


def test_hostile_answers_cost_their_time_and_no_more(caplog):
    judge = MathsJudge(seconds=1.0)
    judge.compare([(f"${n}$", str(n)) for n in range(4)])  # the processes start
    with caplog.at_level(logging.WARNING):
        assert judge.compare([(answer, "4") for answer in HOSTILE * 8]) == [None] * len(HOSTILE) * 8  # each once
    assert "could not be compared with '4' within rewards.maths_seconds (1)" in caplog.text
    judge.seconds = 20
    assert judge.compare([("$4$", "4")]) == [True]  # it lives on


def test_a_stall_is_left_out_and_counted_and_never_a_zero():
    items = [episode("$4$"), episode(HOSTILE[0]), episode("$5$"), episode("$4$", ending="length")]
    config = RewardConfig(answer_kind="maths", maths_seconds=3.0, repetition=0.1)
    Rewarder(config).score(items)
    assert [item.left_out for item in items] == [None, "answer", None, None]
    assert [item.rewards.get("answer") for item in items] == [1.0, None, 0.0, 0.0]
    assert left_out_figures(items)["answer_timeouts"] == 1.0
