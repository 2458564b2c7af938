"""A phase's figures: two answers by hand, and how often anything is right."""

from __future__ import annotations

import numpy as np
import pytest

from minnow.rl.advantages import PhaseScores
from minnow.rl.figures import pass_figures, phase_figures, thinking_figures
from minnow.rl.left_out import settle
from minnow.rl.rollouts import Trajectory
from minnow.tokenizer.chat import Message
from tests.rl.phase_helpers import trajectory

OLD = [np.array([-1.0, -2.0, -0.5], np.float32), np.array([-0.25], np.float32)]
REF = [np.array([-1.5, -1.0, -0.5], np.float32), np.array([-0.5], np.float32)]
SAMPLER = [[-1.1, -1.6, -0.5], [-0.25]]


def two_answers() -> list[Trajectory]:
    """Three tokens that loop until they are cut off, and one that is left out because its judge failed."""
    loop, plain = Message("assistant", "ab" * 10), Message("assistant", "the quick brown fox jumps")
    first = trajectory([5, 6, 7, 8, 9], 3, 1.5, sampler_logprobs=SAMPLER[0], answers=[loop], ending="length")
    second = trajectory([5, 6, 7], 1, -0.5, sampler_logprobs=SAMPLER[1], answers=[plain], ending="stop")
    first.rewards, second.rewards = {"answer": 1.0, "format": 0.5}, {"answer": 0.0, "format": 0.0}
    second.left_out = "judge"
    return [first, second]


@pytest.mark.parametrize("reference", [True, False])
def test_the_figures_of_two_answers_by_hand(reference: bool) -> None:
    figures = phase_figures(two_answers(), PhaseScores(OLD, REF if reference else None, penalties=[]), samples=2)
    by_hand = {
        "reward": 0.5,
        "reward_deviation": 1.0,  # 1.5 and -0.5 lie 1 beside their mean
        "reward/answer": 0.5,
        "reward/format": 0.25,
        "pass@1": 1.0,  # of the one that was judged
        "pass@2": 1.0,
        "length": 2.0,  # 3 and 1
        "truncated": 0.5,
        "entropy": 0.9375,  # (1 + 2 + 0.5 + 0.25) / 4: every token counts the same, not every answer
        # 20 letters hold 15 sixes, 13 of them again: (13/15 - 0.2) / 0.8 = 5/6; the other answer has no loop.
        "repetition": 5 / 12,
        "sampler_mismatch": 0.125,  # (0.1 + 0.4 + 0 + 0) / 4
        "sampler_mismatch_max": 0.4,  # where the sampler was surer than the policy
        "environment_timeouts": 0.0,
        "answer_timeouts": 0.0,
        "judge_failures": 1.0,
    }
    if reference:
        by_hand["kl_to_reference"] = -0.0625  # (0.5 - 1 + 0 + 0.25) / 4: so few tokens may say less than 0
    assert figures == pytest.approx(by_hand, abs=1e-6)


def test_of_a_mixture_both_kinds_are_told_apart() -> None:
    """Two of four were to think."""
    answers = [
        trajectory([5, 6, 7], 1, reward, thinking=thinking)
        for reward, thinking in ((1.0, True), (0.5, True), (0.0, False), (0.5, False))
    ]
    assert thinking_figures(answers) == {"thinking": 0.5, "reward_thinking": 0.75, "reward_at_once": 0.25}
    assert thinking_figures(answers[:2]) == thinking_figures(answers[2:]) == {}
    figures = phase_figures(answers, PhaseScores(OLD[1:] * 4, None, penalties=[]), samples=2)
    assert figures["reward_thinking"] == 0.75


def judged(marks: list[list[float]], *, by: str) -> list[Trajectory]:
    """Answers to as many prompts as there are rows, marked by the reward `answer` or by nothing but their reward."""
    answers = [trajectory([5, 6, 7], 1, mark) for row in marks for mark in row]
    if by == "answer":
        for answer in answers:
            answer.rewards, answer.reward = {"answer": answer.reward}, 1 - answer.reward  # the sum says the opposite
    return answers


def test_answers_that_nobody_judged_are_no_trials() -> None:
    """Settled with the mean of their group, they were right where more than half of it was.

    Prompts: 2 of 3 judged are right; 1 of 2; none was judged. pass@1 = (2/3 + 1/2) / 2.
    """
    answers = judged([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0] * 4], by="answer")
    for place in (3, 6, 7, 8, 9, 10, 11):
        answers[place].left_out = "answer"
    settle(answers, 4, 100)
    assert pass_figures(answers, 4) == pytest.approx({"pass@1": 7 / 12, "pass@4": 1.0})
    settle(answers[8:], 4, 100)
    assert pass_figures(answers[8:], 4) == {"pass@1": 0.0, "pass@4": 0.0}


@pytest.mark.parametrize("by", ["answer", "reward"])
def test_one_right_answer_of_three_is_enough_for_a_prompt(by: str) -> None:
    """Two prompts with three answers each: only the first has any that is right; one half is not right."""
    marks = [[0.0, 1.0, 0.6], [0.5, 0.0, 0.25]]
    assert pass_figures(judged(marks, by=by), 3) == pytest.approx({"pass@1": 2 / 6, "pass@3": 1 / 2})
    # The same answers as three prompts with two each: the first two have one that is right, the third none.
    assert pass_figures(judged(marks, by=by), 2) == pytest.approx({"pass@1": 2 / 6, "pass@2": 2 / 3})
