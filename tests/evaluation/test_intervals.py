"""Wilson's interval against published values and against the quadratic it solves."""

import math

import pytest

from gatera_lightning.evaluation.intervals import Proportion

# 8/10 by hand; the others: Newcombe 1998, table I, method 3 (score interval without continuity correction).
KNOWN = [
    (8, 10, 0.4902, 0.9433),
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("hits", "n", "low", "high"), KNOWN)
def test_known_values(hits, n, low, high):
    assert Proportion(hits, n).interval == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 29, 144, 1000])
def test_ends_solve_wilsons_quadratic_inside_the_unit_interval(n):
    for hits in range(n + 1):
        for end in (interval := Proportion(hits, n).interval):
            assert (hits / n - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, abs=1e-12)
        assert interval[0] - 1e-12 <= hits / n <= interval[1] + 1e-12


def test_nothing_asked_is_nan():
    nothing = Proportion(0, 0)
    assert math.isnan(nothing.value)
    assert all(math.isnan(end) for end in nothing.interval)
    assert str(nothing) == "nan [nan, nan]"


@pytest.mark.parametrize(("hits", "n", "text"), [(8, 10, "0.800 [0.490, 0.943]"), (0, 20, "0.000 [0.000, 0.161]")])
def test_printed(hits, n, text):
    assert str(Proportion(hits, n)) == text


def test_rounding_never_leaves_the_unit_interval():
    outside = [n for n in range(1, 200) if Proportion(0, n).interval[0] < 0 or Proportion(n, n).interval[1] > 1]
    assert outside == []  # else 0 of 65 is printed as 0.000 [-0.000, 0.056]
