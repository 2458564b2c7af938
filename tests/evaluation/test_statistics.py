import math

import pytest

from minnow.evaluation.statistics import bootstrap_ratio, mean_and_standard_error, wilson_interval


def test_wilson_by_hand():
    # p = .8, n = 10, z = 2: centre .8 + 4/20 = 1; margin 2 sqrt(.16/10 + 4/400) = 2 sqrt(.026) = .32249; scale 1.4.
    bar = wilson_interval(8, 10, z=2.0)
    assert bar.value == pytest.approx(0.8)
    assert bar.low == pytest.approx((1 - 0.32249) / 1.4, abs=1e-5)
    assert bar.high == pytest.approx((1 + 0.32249) / 1.4, abs=1e-5)


def test_wilson_stays_inside_and_open_at_the_ends():
    # All right: low = 1 / (1 + z^2 / n) = 10 / (10 + 4), high = 1.
    all_right = wilson_interval(10, 10, z=2.0)
    assert (all_right.low, all_right.high) == (pytest.approx(10 / 14), pytest.approx(1.0))
    none_right = wilson_interval(0, 10, z=2.0)
    assert (none_right.low, none_right.high) == (pytest.approx(0.0), pytest.approx(4 / 14))
    with pytest.raises(ValueError, match="no trials"):
        wilson_interval(0, 0)


def test_wilson_holds_95_per_cent_unless_told_otherwise():
    # 8 of 10: centre .8 + 3.8415/20 = .99207; margin 1.96 sqrt(.016 + 3.8415/400) = .31361; scale 1.38415.
    bar = wilson_interval(8, 10)
    assert (bar.low, bar.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_no_share_lies_outside_of_0_and_1():
    """Rounding must not print a share of -0.0% or 100.1%."""
    for trials in range(1, 200):
        assert wilson_interval(0, trials).low >= 0
        assert wilson_interval(trials, trials).high <= 1


def test_mean_and_standard_error_by_hand():
    # Mean 2.5; squares 2.25 + .25 + .25 + 2.25 = 5; variance 5/3; error sqrt(5/3 / 4).
    assert mean_and_standard_error([1, 2, 3, 4]) == (2.5, pytest.approx(math.sqrt(5 / 12)))
    assert mean_and_standard_error([7.0]) == (7.0, math.inf)


def test_bootstrap_of_a_ratio():
    # Every row has the ratio 2: however they are drawn, the ratio is 2.
    same = bootstrap_ratio([2, 4, 6], [1, 2, 3])
    assert (same.value, same.low, same.high) == (2.0, 2.0, 2.0)
    # The ratio of the sums, not the mean of the ratios: (1 + 9) / (1 + 3) = 2.5, not (1 + 3) / 2.
    assert bootstrap_ratio([1, 9], [1, 3]).value == 2.5


def test_bootstrap_agrees_with_the_normal_interval():
    # 400 coins, half heads: standard error sqrt(.25 / 400) = .025, so about .5 -/+ .049.
    bar = bootstrap_ratio([0, 1] * 200, [1] * 400)
    assert bar.low == pytest.approx(0.451, abs=0.008)
    assert bar.high == pytest.approx(0.549, abs=0.008)
    assert bar == bootstrap_ratio([0, 1] * 200, [1] * 400)
    assert bar != bootstrap_ratio([0, 1] * 200, [1] * 400, seed=1)
