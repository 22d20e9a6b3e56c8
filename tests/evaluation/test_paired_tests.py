"""Paired tests against brute force, published examples, normal theory, and their nominal error rates."""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from gatera_lightning.evaluation import paired_tests as paired
from gatera_lightning.evaluation.paired_tests import (
    Difference,
    PairedOutcomes,
    holm,
    macro_difference,
    pooled_difference,
)

Z = 1.959963984540054


def rng(seed=0):
    return np.random.default_rng(seed)


# --- McNemar's mid-p ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "c"), [*product(range(8), repeat=2), (30, 12), (3, 40), (77, 78)])
def test_mcnemar_mid_p_matches_exact_binomial(b, c):
    n = b + c
    pmf = [Fraction(math.comb(n, k), 2**n) for k in range(n + 1)]
    tail = min(sum(pmf[: b + 1]), sum(pmf[b:]))
    assert PairedOutcomes(5, b, c, 9).p == float(2 * (tail - pmf[b] / 2))


def test_mcnemar_p_is_one_without_evidence():
    assert PairedOutcomes(7, 0, 0, 3).p == 1
    assert PairedOutcomes(0, 4, 4, 0).p == 1


def test_mcnemar_mid_p_matches_normal_approximation():
    z = 300 / math.sqrt(20_300)
    assert PairedOutcomes(0, 10_000, 10_300, 0).p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=2e-3)


def test_paired_outcomes_counts_cells():
    first, second = [True] * 6 + [False] * 9, [True] * 1 + [False] * 5 + [True] * 2 + [False] * 7
    assert PairedOutcomes.of(first, second) == PairedOutcomes(both=1, only_first=5, only_second=2, neither=7)
    assert PairedOutcomes.of(first, second).difference.value == pytest.approx(3 / 15 - 6 / 15)
    with pytest.raises(ValueError, match="longer"):
        PairedOutcomes.of(first, [*second, True])


# --- Newcombe's interval ------------------------------------------------------------------------------------

# Altman et al. 2000, "Statistics with confidence", table 6.2; Fagerland et al. 2013 (Bentur et al. 2009)
PUBLISHED = [
    (PairedOutcomes(14, 0, 5, 22), (0.0115, 0.2265), 0.0313),
    (PairedOutcomes(1, 1, 7, 12), (0.026, 0.507), 0.0391),
]


@pytest.mark.parametrize(("table", "interval", "p"), PUBLISHED)
def test_paired_outcomes_match_published_examples(table, interval, p):
    assert table.interval == pytest.approx(interval, abs=5e-4)
    assert table.p == pytest.approx(p, abs=1e-4)


def newcombe(a, b, c, d):
    """Method 10 for second minus first, with Wilson limits from the roots of their quadratic equation."""
    n = a + b + c + d
    p1, p2 = (a + b) / n, (a + c) / n
    (l1, u1), (l2, u2) = (sorted(np.roots([1 + Z**2 / n, -2 * p - Z**2 / n, p * p]).real) for p in (p1, p2))
    excess, margins = a * d - b * c, (a + b) * (c + d) * (a + c) * (b + d)
    excess = max(excess - n / 2, 0) if excess > 0 else excess
    phi = 0 if margins == 0 else excess / margins**0.5
    low = np.array([p2 - l2, u1 - p1])
    high = np.array([u2 - p2, p1 - l1])
    correlation = np.array([[1, -phi], [-phi, 1]])
    return p2 - p1 - (low @ correlation @ low) ** 0.5, p2 - p1 + (high @ correlation @ high) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_newcombe_interval_of_every_small_table(n):
    for a, b, c in product(range(n + 1), repeat=3):
        if (d := n - a - b - c) < 0:
            continue
        low, high = PairedOutcomes(a, b, c, d).interval
        assert (low, high) == pytest.approx(newcombe(a, b, c, d), abs=1e-6)
        assert -1 - 1e-12 <= low <= (c - b) / n <= high <= 1 + 1e-12
        assert PairedOutcomes(a, c, b, d).interval == pytest.approx((-high, -low))  # with the runs swapped


def test_newcombe_interval_narrows_with_correlation():
    correlated, independent = PairedOutcomes(480, 20, 20, 480), PairedOutcomes(250, 250, 250, 250)
    assert correlated.interval == pytest.approx((-0.01241, 0.01241), abs=2e-4)  # Wald: 1.96 sqrt(40) / 1000
    assert independent.interval == pytest.approx((-0.0438, 0.0438), abs=2e-4)  # Wald: 1.96 sqrt(500) / 1000


def test_paired_outcomes_without_examples_are_nan():
    nothing = PairedOutcomes(0, 0, 0, 0).difference
    assert all(math.isnan(number) for number in (nothing.value, nothing.low, nothing.high, nothing.p))


# --- paired bootstrap ---------------------------------------------------------------------------------------


def losses(n, generator, shift=0.0, noise=0.3):
    """Losses of two runs on the same examples; pairing removes the difficulty that they share."""
    tokens = generator.integers(1, 9, n)
    difficulty = tokens * generator.gamma(2.0, 0.5, n)
    first, second = (
        difficulty + tokens * generator.normal(0, noise, (2, n)) + tokens * np.array([[0.0], [shift]])
    )
    return first, second, tokens


@pytest.mark.parametrize("chunk", [1, 130, 10**6])
def test_pooled_difference_matches_loop_over_resamples(chunk, monkeypatch):
    monkeypatch.setattr(paired, "_MAX_DRAWS", chunk)
    first, second, tokens = losses(40, rng(3), shift=0.1)
    found = pooled_difference(first, second, tokens, rng(5), resamples=50)
    draws, generator = [], rng(5)
    for _ in range(50):
        drawn = generator.integers(40, size=40)
        total = sum(tokens[i] for i in drawn)
        draws.append(sum(second[i] for i in drawn) / total - sum(first[i] for i in drawn) / total)
    below, above = sum(d <= 0 for d in draws), sum(d >= 0 for d in draws)
    assert found.value == pytest.approx(second.sum() / tokens.sum() - first.sum() / tokens.sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))
    assert found.p == pytest.approx(min(1, 2 * (min(below, above) + 1) / 51))


def test_pooled_difference_matches_delta_method():
    first, second, tokens = losses(800, rng(1), shift=0.02)
    found = pooled_difference(first, second, tokens, rng(2))
    residual = second - first - found.value * tokens
    error = residual.std() / tokens.mean() / math.sqrt(800)
    assert (found.low, found.high) == pytest.approx(
        (found.value - Z * error, found.value + Z * error), abs=0.1 * error
    )
    assert found.p == pytest.approx(math.erfc(abs(found.value) / error / math.sqrt(2)), abs=0.02)


def test_macro_difference_matches_normal_theory():
    tasks = [PairedOutcomes(150, 20, 30, 100), PairedOutcomes(20, 6, 12, 2), PairedOutcomes(400, 60, 55, 85)]
    found = macro_difference(tasks, rng(4), resamples=40_000)
    shares = [
        ((t.only_second - t.only_first) / t.n, (t.only_second + t.only_first) / t.n, t.n) for t in tasks
    ]
    value = sum(d for d, _, _ in shares) / 3
    error = math.sqrt(sum((moved - d * d) / (n - 1) for d, moved, n in shares)) / 3
    assert found.value == pytest.approx(value)
    assert (found.low, found.high) == pytest.approx((value - Z * error, value + Z * error), abs=0.1 * error)
    assert found.p == pytest.approx(math.erfc(value / error / math.sqrt(2)), abs=0.02)


def test_macro_difference_corrects_variance_of_small_tasks():
    found = macro_difference([PairedOutcomes(0, 2, 2, 0)] * 50, rng(), resamples=40_000)
    assert found.high == pytest.approx(
        Z * math.sqrt(1 / 3 / 50), rel=0.05
    )  # n draws instead of n − 1 would give sqrt(1 / 4 / 50)


def test_bootstrap_p_is_never_zero():
    first, second, tokens = losses(100, rng(), shift=5.0)
    assert pooled_difference(first, second, tokens, rng(), resamples=999).p == pytest.approx(2 / 1000)
    assert macro_difference([PairedOutcomes(0, 0, 500, 0)] * 2, rng(), resamples=999).p == pytest.approx(
        2 / 1000
    )


def test_bootstrap_of_equal_runs_shows_no_difference():
    first, _, tokens = losses(100, rng())
    assert pooled_difference(first, first.copy(), tokens, rng(), resamples=99) == Difference(
        0.0, 0.0, 0.0, 1.0
    )
    assert macro_difference([PairedOutcomes(60, 0, 0, 40)] * 3, rng(), resamples=99) == Difference(
        0.0, 0.0, 0.0, 1.0
    )


def test_bootstrap_counts_rounding_errors_as_zero():
    found = paired._percentile_bootstrap(0.0, np.array([0.1 + 0.2 - 0.3] * 99))
    assert found.p == 1


def test_bootstrap_of_few_examples_has_no_interval():
    first, second, tokens = losses(19, rng())
    for found in (
        pooled_difference(first, second, tokens, rng()),
        macro_difference([PairedOutcomes(2, 3, 4, 0)] * 2, rng()),
        macro_difference([PairedOutcomes(20, 3, 4, 10), PairedOutcomes(0, 0, 1, 0)], rng()),
    ):
        assert not math.isnan(found.value)
        assert all(math.isnan(number) for number in (found.low, found.high, found.p))
        assert found.verdict(higher_is_better=True) == "too few examples"


def test_bootstrap_rejects_invalid_input():
    with pytest.raises(ValueError, match="got no tasks"):
        macro_difference([], rng())
    with pytest.raises(ValueError, match="expected three arrays"):
        pooled_difference(np.ones(3), np.ones(2), np.ones(3, int), rng())
    with pytest.raises(ValueError, match="total weight of 0"):
        pooled_difference(np.ones(30), np.ones(30), np.zeros(30, int), rng())


def test_verdict_depends_on_sign_and_level():
    up, down, unsure = (
        Difference(0.1, 0.0, 0.2, 0.049),
        Difference(-0.1, -0.2, 0.0, 0.049),
        Difference(0.1, -0.1, 0.2, 0.05),
    )
    assert [d.verdict(higher_is_better=True) for d in (up, down, unsure)] == [
        "better",
        "worse",
        "no difference shown",
    ]
    assert [d.verdict(higher_is_better=False) for d in (up, down, unsure)] == [
        "worse",
        "better",
        "no difference shown",
    ]


def differences(*ps):
    return [Difference(0.1, 0.0, 0.2, p) for p in ps]


@pytest.mark.parametrize(
    ("ps", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the example of R's p.adjust
        ([0.02], [0.02]),
        ([0.5, 0.9, 0.6], [1.0, 1.0, 1.0]),
        ([0.01, 0.01, 0.01], [0.03, 0.03, 0.03]),
        ([0.03, math.nan, 0.01], [0.03, math.nan, 0.02]),  # an untested difference is no test
        ([math.nan], [math.nan]),
        ([], []),
    ],
)
def test_holm(ps, adjusted):
    found = holm(differences(*ps))
    assert [d.adjusted_p for d in found] == pytest.approx(adjusted, nan_ok=True)
    assert [d.p for d in found] == pytest.approx(ps, nan_ok=True)


def test_verdict_uses_adjusted_p():
    found = holm(differences(0.02, 0.03, 0.9, math.nan))
    verdicts = ["no difference shown"] * 3 + ["too few examples"]
    assert [d.verdict(higher_is_better=True) for d in found] == verdicts
    assert holm(differences(0.001, 0.03))[1].verdict(higher_is_better=True) == "better"


# --- calibration: of 100 comparisons between equal runs, about 5 are significant ----------------------------


def answers(generator, replications, n, accuracy, shared, gain=0.0):
    """Whether two runs are correct, (replications, n) each; they agree on a share of ``shared`` examples."""
    first, own = generator.random((2, replications, n))
    second = np.where(generator.random((replications, n)) < shared, first, own)
    return first < accuracy, second < accuracy + gain


def rejections(first, second):
    cells = (first & second, first & ~second, ~first & second, ~(first | second))
    tables = np.stack([cell.sum(1) for cell in cells], axis=1).tolist()  # (replications, 4)
    return np.mean([PairedOutcomes(*table).p < paired.SIGNIFICANCE_LEVEL for table in tables])


@pytest.mark.parametrize("accuracy", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_mcnemar_has_nominal_error_rate(accuracy, shared):
    assert 0.03 <= rejections(*answers(rng(11), 2_000, 200, accuracy, shared)) <= 0.07


@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_newcombe_interval_covers_true_difference(shared):
    first, second = answers(rng(12), 2_000, 200, 0.7, shared, gain=0.05)
    covered = 0
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        low, high = PairedOutcomes.of(one, other).interval
        covered += low <= 0.05 <= high
    assert 0.93 <= covered / 2_000 <= 0.97


def test_mcnemar_detects_ten_points_in_thousand_examples():
    assert rejections(*answers(rng(13), 500, 1_000, 0.6, 0.0, gain=0.1)) >= 0.99


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_pooled_difference_has_nominal_error_rate(noise):
    generator = rng(14)
    found = [
        pooled_difference(*losses(150, generator, noise=noise), generator, resamples=400)
        for _ in range(1_000)
    ]
    assert 0.03 <= np.mean([d.p < paired.SIGNIFICANCE_LEVEL for d in found]) <= 0.07


def test_pooled_difference_detects_difference():
    generator = rng(15)
    found = [
        pooled_difference(*losses(500, generator, shift=-0.1), generator, resamples=400) for _ in range(100)
    ]
    assert np.mean([d.verdict(higher_is_better=False) == "better" for d in found]) >= 0.99


@pytest.mark.parametrize("sizes", [(60, 120, 240), (8,) * 25])
@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_macro_difference_has_nominal_error_rate(sizes, shared):
    generator, rejected = rng(16), []
    for _ in range(1_000):
        tasks = []
        for task, n in enumerate(sizes):
            first, second = answers(generator, 1, n, 0.5 + 0.4 * task / len(sizes), shared)
            tasks.append(PairedOutcomes.of(first[0].tolist(), second[0].tolist()))
        rejected.append(macro_difference(tasks, generator, resamples=400).p < paired.SIGNIFICANCE_LEVEL)
    assert 0.03 <= np.mean(rejected) <= 0.07


@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_equal_runs_on_eight_tasks_rarely_get_a_verdict(shared):
    """The tasks and their average are one family; without Holm, a third of comparisons name a task."""
    generator, replications = rng(16), 600
    tasks = [answers(generator, replications, 150, accuracy, shared) for accuracy in np.linspace(0.5, 0.9, 8)]
    raw = adjusted = better = 0
    for i in range(replications):
        tables = [PairedOutcomes.of(first[i].tolist(), second[i].tolist()) for first, second in tasks]
        family = [table.difference for table in tables]
        family.append(macro_difference(tables, generator, resamples=500))
        verdicts = {found.verdict(higher_is_better=True) for found in holm(family)}
        raw += any(found.p < paired.SIGNIFICANCE_LEVEL for found in family)
        adjusted += verdicts != {"no difference shown"}
        better += "better" in verdicts
    assert raw / replications > 0.25
    assert better <= adjusted <= 0.065 * replications  # 0.05 and 1.7 standard errors
