"""SPO's tracker against its formulas worked out by hand."""

import numpy as np
import pytest

from minnow.config import UserError
from minnow.rl.value_tracker import ValueTracker


def test_seeding_and_updating_by_hand():
    tracker = ValueTracker(2)
    assert tracker.values(np.array([0, 1])).tolist() == [0.5, 0.5]
    # 8 answers, 6 right: alpha = 8 x 6.5 / 9 = 5.7778, beta = 8 x 2.5 / 9 = 2.2222, value 6.5 / 9
    tracker.seed(0, np.array([1.0] * 6 + [0.0] * 2))
    assert tracker.alpha_P[0] == pytest.approx(52 / 9)
    assert tracker.beta_P[0] == pytest.approx(20 / 9)
    assert tracker.values(np.array([0]))[0] == pytest.approx(6.5 / 9)
    # drift 0 -> rho = min(1, .96) = .96: alpha = .96 x 52/9 + 1, beta = .96 x 20/9
    tracker.update(np.array([0]), np.array([1.0]), np.array([0.0]))
    assert tracker.alpha_P[0] == pytest.approx(0.96 * 52 / 9 + 1)
    assert tracker.beta_P[0] == pytest.approx(0.96 * 20 / 9)
    # drift .06 -> 2^-1 = .5 -> .875; drift .006 -> 2^-.1 = .933 stands
    for drift, rho in ((0.06, 0.875), (0.006, 2**-0.1)):
        fresh = ValueTracker(1)
        fresh.update(np.array([0]), np.array([0.25]), np.array([drift]))
        assert fresh.alpha_P[0] == pytest.approx(rho * 0.5 + 0.25)
        assert fresh.beta_P[0] == pytest.approx(rho * 0.5 + 0.75)


def test_open_prompts_are_sampled_most():
    tracker = ValueTracker(3)
    tracker.seed(0, np.ones(8))
    tracker.seed(2, np.zeros(8))
    weights = tracker.sampling_weights()
    assert weights[1] == pytest.approx(0.5 + 0.05)
    assert weights[0] == pytest.approx(weights[2])
    assert weights[0] < weights[1]


def test_state_goes_round_and_bad_rewards_are_refused():
    tracker = ValueTracker(2)
    tracker.update(np.array([1, 1]), np.array([1.0, 0.0]), np.zeros(2))
    other = ValueTracker(2)
    other.load_state_dict(tracker.state_dict())
    assert np.array_equal(other.alpha_P, tracker.alpha_P)
    assert np.array_equal(other.beta_P, tracker.beta_P)
    for wrong in (1.5, -0.5):
        with pytest.raises(UserError, match=f"from 0 to 1, but one is {wrong}"):
            tracker.update(np.array([0]), np.array([wrong]), np.zeros(1))
        with pytest.raises(UserError, match=f"from 0 to 1, but one is {wrong}"):
            tracker.seed(0, np.array([wrong]))
