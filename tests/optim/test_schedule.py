"""Every schedule at steps worked out by hand."""

import itertools
import math

import pytest

from minnow.config import UserError
from minnow.optim import ScheduleConfig, learning_rate_factor


def factors(steps, total, **values):
    config = ScheduleConfig(**values)
    return [learning_rate_factor(config, step, total) for step in steps]


def test_warm_up_counts_from_one():
    # (s + 1) / 4: the first step already moves, the fourth has the peak.
    assert factors(range(6), 100, shape="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_run_without_settings_gets_the_defaults_that_published_figures_were_measured_with():
    # 1000 steps: 100 of warm-up, 650 of linear decay from step 350 on (s = 675: half), down to a twentieth.
    assert factors([0, 99, 349, 675, 1000], 1000) == pytest.approx([0.01, 1.0, 1.0, 0.525, 0.05])


def test_constant_stays():
    assert factors([0, 50, 99, 100], 100, shape="constant", warmup_steps=0) == [1.0] * 4


def test_wsd_linear():
    # 100 steps, the last 40% = 40 decay: from step 60 on done = (s - 60) / 40, factor = 0.1 + 0.9 (1 - done).
    # s = 59, 60: 1. s = 70: done 0.25, 0.1 + 0.675 = 0.775. s = 80: 0.55. s = 99: done 39/40, 0.1 + 0.9/40 = 0.1225.
    got = factors(
        [5, 59, 60, 70, 80, 99, 100],
        100,
        shape="wsd",
        warmup_steps=10,
        decay_fraction=0.4,
        final_fraction=0.1,
    )
    assert got == pytest.approx([0.6, 1.0, 1.0, 0.775, 0.55, 0.1225, 0.1])


def test_wsd_counts_its_decay_in_the_nearest_whole_steps():
    # 0.29 x 100 is 28.999999999999996 in floating point: 29 steps, from 71 on.
    got = factors([71, 72], 100, shape="wsd", warmup_steps=0, decay_fraction=0.29, final_fraction=0.0)
    assert got == pytest.approx([1.0, 28 / 29])


def test_wsd_one_minus_sqrt():
    # The same with factor = 0.1 + 0.9 (1 - sqrt(done)). s = 60: 1.
    # s = 69: done 9/40, sqrt 0.47434. s = 70: sqrt(1/4) = 0.5, 0.55.
    got = factors(
        [60, 69, 70, 100],
        100,
        shape="wsd",
        decay_shape="sqrt",
        warmup_steps=10,
        decay_fraction=0.4,
        final_fraction=0.1,
    )
    assert got == pytest.approx([1.0, 0.1 + 0.9 * (1 - 0.4743416), 0.55, 0.1])


def test_wsd_without_a_decay_stays():
    assert factors([10, 99], 100, shape="wsd", warmup_steps=10, decay_fraction=0.0) == [1.0, 1.0]


def test_wsd_decay_never_starts_inside_the_warm_up():
    # 100 steps, decay 90% would start at 10, but the warm-up ends at 40: done = (s - 40) / 60, s = 70: 0.5.
    got = factors([39, 40, 70], 100, shape="wsd", warmup_steps=40, decay_fraction=0.9, final_fraction=0.0)
    assert got == pytest.approx([1.0, 1.0, 0.5])


def test_cosine():
    # done = (s - 10) / 100; factor 0.1 + 0.9 * (1 + cos(pi done)) / 2. done 0: 1. 1/4: cos 45 = 0.70711,
    # 0.1 + 0.9 * 0.85355 = 0.86820. 1/2: 0.55. 1: 0.1.
    got = factors([9, 10, 35, 60, 110], 110, shape="cosine", warmup_steps=10, final_fraction=0.1)
    assert got == pytest.approx([1.0, 1.0, 0.8681981, 0.55, 0.1])


def test_cosine_without_warm_up_is_minimind_s():
    # lr (0.1 + 0.45 (1 + cos(pi t / T))), t from 0.
    got = factors(range(0, 50, 7), 50, shape="cosine", warmup_steps=0, final_fraction=0.1)
    assert got == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * t / 50)) for t in range(0, 50, 7)])


def test_linear():
    # done = (s - 10) / 90; factor 1 - done with final 0. s = 55: 0.5. s = 99: 1/90.
    got = factors([10, 55, 99, 100], 100, shape="linear", warmup_steps=10, final_fraction=0.0)
    assert got == pytest.approx([1.0, 0.5, 1 / 90, 0.0])


def test_cosine_with_restarts():
    # 10 warm-up steps, then 100 in 4 cycles of 25, final 0.2. Start of each cycle (10, 35, 60, 85): 1.
    # One fifth into a cycle (15, 40): 0.2 + 0.8 (1 + cos 36) / 2 = 0.2 + 0.4 * 1.809017 = 0.9236068.
    # The last step of a cycle (34): done 24/25, cos(172.8) = -0.9921147, 0.2 + 0.4 * 0.0078853 = 0.2031541.
    got = factors(
        [10, 35, 60, 85, 15, 40, 34, 110], 110, shape="cosine_restarts", warmup_steps=10, final_fraction=0.2, cycles=4
    )
    assert got == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.9236068, 0.9236068, 0.2031541, 0.2])
    # 44 steps in 22 cycles of 2: every other step is a peak. 30 / 44 x 22 is 14.999999999999998 in floating point.
    peaks = factors(range(0, 44, 2), 44, shape="cosine_restarts", warmup_steps=0, cycles=22)
    assert peaks == [1.0] * 22


@pytest.mark.parametrize("shape", ["wsd", "cosine", "linear", "constant", "cosine_restarts"])
def test_a_run_shorter_than_its_warm_up_still_warms_up_and_falls(shape):
    # 8 steps, warm-up cut from 100 to 4: 1/4, 2/4, 3/4, 1, and the rest falls from the peak.
    more = {} if shape == "constant" else {"final_fraction": 0.0}
    more |= {"cycles": 1} if shape == "cosine_restarts" else {}
    got = factors(range(8), 8, shape=shape, warmup_steps=100, **more)
    assert got[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(later <= earlier for earlier, later in itertools.pairwise(got[4:]))
    assert all(0 < factor <= 1 for factor in got)


@pytest.mark.parametrize("shape", ["wsd", "cosine", "linear", "constant", "cosine_restarts"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs(shape, total):
    # One step: no warm-up (1 // 2 = 0), so the peak.
    got = factors(range(total + 1), total, shape=shape)
    assert got[0] == 1.0
    assert all(0 < factor <= 1 for factor in got)


@pytest.mark.parametrize("shape", ["wsd", "cosine", "linear", "cosine_restarts"])
def test_the_end_of_the_run_has_the_final_fraction(shape):
    assert factors([1000, 1500], 1000, shape=shape, final_fraction=0.3) == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"decay_fraction": 1.5}, "decay_fraction"),
        ({"final_fraction": -0.1}, "final_fraction"),
        ({"cycles": 0}, "cycles"),
    ],
)
def test_impossible_values_are_named(values, message):
    with pytest.raises(UserError, match=message):
        ScheduleConfig(**values)
