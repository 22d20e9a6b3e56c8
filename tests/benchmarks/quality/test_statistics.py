"""Intervals over crossed seeds and rows, against the variance of an additive model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from benchmarks.quality.statistics import Part, compare, correct_for_number, detectable_difference


def test_standard_error_counts_seeds_and_rows():
    rng = np.random.default_rng(1)
    seeds, rows = rng.normal(0.3, 0.1, 4), rng.normal(0, 0.5, 60)
    found = compare([Part(seeds[:, None] + rows, np.ones(60))], resamples=20_000)
    expected = np.sqrt(seeds.var(ddof=1) / 4 + rows.var() / 60)  # seeds and rows are independent
    assert found.standard_error == pytest.approx(expected, rel=0.03)
    assert found.difference.value == pytest.approx(seeds.mean() + rows.mean())
    assert found.difference.low < found.difference.value < found.difference.high
    freedom = 3 * expected**4 / (seeds.var(ddof=1) / 4) ** 2
    assert found.degrees_of_freedom == pytest.approx(freedom, rel=0.15)
    half = scipy.stats.t.ppf(0.975, freedom) * expected
    assert found.difference.high - found.difference.low == pytest.approx(2 * half, rel=0.05)


@pytest.mark.parametrize("row_noise", [0.0, 0.1, 1.0])
def test_three_seeds_without_an_effect_rarely_show_one(row_noise):
    rng = np.random.default_rng(2)
    shown = 0
    for _ in range(400):
        values = rng.normal(0, 0.1, (3, 1)) + rng.normal(0, row_noise, 20) + rng.normal(0, row_noise, (3, 20))
        shown += compare([Part(values, np.ones(20))], resamples=300).difference.p < 0.05
    assert shown / 400 <= 0.08


def test_parts_with_the_same_rows_are_drawn_together():
    values = np.random.default_rng(3).normal(0, 1, (3, 40))
    once = compare([Part(values, np.ones(40), "prose")])
    twice = compare([Part(values, np.ones(40), "prose")] * 2)
    assert twice.standard_error == pytest.approx(once.standard_error)
    apart = compare([Part(values, np.ones(40)), Part(values, np.ones(40))])
    assert apart.standard_error < 0.9 * once.standard_error


def test_rows_are_weighted_by_their_tokens():
    parts = [
        Part(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1.0, 3.0])),
        Part(np.zeros((2, 5)), np.ones(5)),
    ]
    assert compare(parts).difference.value == pytest.approx((5 / 4 + 0) / 2)
    same = compare([Part(np.zeros((3, 4)), np.ones(4))])
    assert same.difference.p == 1
    with pytest.raises(ValueError, match=r"parts with \[2, 3\] seeds"):
        compare([parts[0], Part(np.zeros((3, 4)), np.ones(4))])


def test_one_seed_has_no_interval():
    found = compare([Part(np.ones((1, 30)), np.ones(30))])
    assert found.difference.value == 1
    assert np.isnan([found.difference.low, found.difference.p, found.standard_error]).all()


def test_correction_and_power():
    strong = compare([Part(np.random.default_rng(0).normal(9, 1, (3, 30)), np.ones(30))])
    weak = compare([Part(np.random.default_rng(0).normal(0, 1, (3, 30)), np.ones(30))])
    adjusted = correct_for_number([weak, strong])
    assert adjusted[1].difference.adjusted_p == pytest.approx(2 * strong.difference.p)
    assert adjusted[1].difference.verdict(higher_is_better=False) == "worse"
    assert adjusted[0].difference.verdict(higher_is_better=False) == "no difference shown"
    # z(0.975) = 1.960, z(0.995) = 2.576 and z(0.8) = 0.842; t(2, 0.975) = 4.303 and t(2, 0.8) = 1.061
    exact = replace(weak, standard_error=0.1, degrees_of_freedom=math.inf)
    assert detectable_difference(exact, 1) == pytest.approx(0.2802, abs=1e-4)
    assert detectable_difference(exact, 5) == pytest.approx(0.3418, abs=1e-4)
    assert detectable_difference(replace(exact, degrees_of_freedom=2), 1) == pytest.approx(0.5364, abs=1e-4)
