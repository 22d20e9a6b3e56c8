"""The Wilson interval against published values, and the coverage of the interval of a mean."""

import math

import numpy as np
import pytest

from gatera_lightning.evaluation.intervals import Average, Proportion

# 8/10 by hand; the others: Newcombe 1998, table I, method 3 (score interval without continuity correction).
KNOWN = [
    (8, 10, 0.4902, 0.9433),
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("hits", "n", "low", "high"), KNOWN)
def test_wilson_interval_matches_published_values(hits, n, low, high):
    assert Proportion(hits, n).interval == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 29, 144, 1000])
def test_wilson_limits_solve_quadratic_equation(n):
    for hits in range(n + 1):
        for end in (interval := Proportion(hits, n).interval):
            assert (hits / n - end) ** 2 == pytest.approx(
                1.959963984540054**2 * end * (1 - end) / n, abs=1e-12
            )
        assert interval[0] - 1e-12 <= hits / n <= interval[1] + 1e-12


def test_proportion_of_nothing_is_nan():
    nothing = Proportion(0, 0)
    assert math.isnan(nothing.value)
    assert all(math.isnan(end) for end in nothing.interval)
    assert str(nothing) == "nan [nan, nan]"


@pytest.mark.parametrize(
    ("hits", "n", "text"), [(8, 10, "0.800 [0.490, 0.943]"), (0, 20, "0.000 [0.000, 0.161]")]
)
def test_proportion_prints_value_and_interval(hits, n, text):
    assert str(Proportion(hits, n)) == text


def test_wilson_interval_is_clipped_to_unit_interval():
    """Rounding would print 0 of 65 as 0.000 [-0.000, 0.056]."""
    outside = [
        n for n in range(1, 200) if Proportion(0, n).interval[0] < 0 or Proportion(n, n).interval[1] > 1
    ]
    assert outside == []


# --- mean of several proportions ---

PARTS = [(18, 20), (30, 50), (3, 10)]


def average(*parts):
    return Average(tuple(Proportion(hits, n) for hits, n in parts))


def test_average_weights_parts_equally():
    assert average((1, 1), (0, 99)).value == 0.5
    assert average(*PARTS).value == pytest.approx((0.9 + 0.6 + 0.3) / 3)


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 20), (7, 9), (81, 263), (65, 65)])
def test_average_of_one_part_has_wilson_interval(hits, n):
    assert average((hits, n)).interval == pytest.approx(Proportion(hits, n).interval)


def test_average_interval_adds_squared_distances():
    """By hand: 8 of 10 is 0.8 [0.4902, 0.9433] and 1 of 29 is 0.0345 [0.0061, 0.1718]."""
    low, high = average((8, 10), (1, 29)).interval
    value = (0.8 + 1 / 29) / 2
    assert value - low == pytest.approx(math.hypot(0.8 - 0.4902, 1 / 29 - 0.0061) / 2, abs=5e-5)
    assert high - value == pytest.approx(math.hypot(0.9433 - 0.8, 0.1718 - 1 / 29) / 2, abs=5e-5)


def test_average_interval_matches_normal_approximation():
    parts = [(9000, 10_000), (4200, 7000), (9000, 30_000)]
    variance = sum(p * (1 - p) / n for p, n in ((0.9, 10_000), (0.6, 7000), (0.3, 30_000))) / 9
    low, high = average(*parts).interval
    assert (high - low) / 2 == pytest.approx(1.96 * variance**0.5, rel=1e-3)
    assert (high + low) / 2 == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize("shares", [(0.9, 0.6, 0.3), (0.98, 0.95, 0.9), (0.5, 0.5, 0.02)], ids=str)
def test_average_interval_covers_true_mean(shares):
    """Monte Carlo: samples of 20, 50 and 10 questions from three tasks whose true accuracies are known."""
    draws = np.random.default_rng(0).binomial((20, 50, 10), shares, (4000, 3))
    found = [average(*zip(hits, (20, 50, 10), strict=True)).interval for hits in draws.tolist()]
    covered = sum(low <= sum(shares) / 3 <= high for low, high in found) / len(found)
    assert 0.93 <= covered <= 0.985
    missed_above = sum(low > sum(shares) / 3 for low, _ in found) / len(found)
    assert missed_above <= 0.045  # the misses are not all on one side


@pytest.mark.parametrize(
    "parts",
    [[(0, 65)] * 3, [(65, 65)] * 3, [(0, 1), (1, 1)], [(1, 1)], PARTS, [(1, 1)] * 7 + [(199, 200)]],
    ids=str,
)
def test_average_interval_contains_mean_inside_unit_interval(parts):
    low, high = average(*parts).interval
    assert 0 <= low <= average(*parts).value <= high <= 1
    assert high > low


def test_average_with_empty_part_is_nan():
    for nothing in (average(), average((3, 4), (0, 0))):
        assert math.isnan(nothing.value)
        assert all(math.isnan(end) for end in nothing.interval)
        assert str(nothing) == "nan [nan, nan]"
    assert str(average(*PARTS)) == "0.600 [0.496, 0.712]"
