"""Two runs on the same questions: paired tests and 95 % intervals of their difference, always second minus first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gatera_lightning.evaluation.intervals import Proportion

LEVEL = 0.05
RESAMPLES = 10_000
# Percentile intervals of fewer rows are too narrow: of 20 normal differences they cover 93 %, of 5 only 84 %.
MIN_BOOTSTRAP_ROWS = 20
_CHUNK = 2_000_000  # drawn rows held at once, 16 MB an array


@dataclass(frozen=True)
class Difference:
    """Second minus first with its 95 % interval and two-sided p; interval and p are NaN where the rows are too few."""

    value: float
    low: float
    high: float
    p: float

    def verdict(self, *, higher_is_better: bool) -> str:
        """``better``, ``worse``, ``no difference shown`` at the 5 % level, of the second run; or ``too few rows``."""
        if math.isnan(self.p):
            return "too few rows"
        if self.p >= LEVEL:
            return "no difference shown"
        return "better" if (self.value > 0) == higher_is_better else "worse"


@dataclass(frozen=True)
class PairedOutcomes:
    """How often two runs answer the same question right: the 2 × 2 table of paired proportions."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> "PairedOutcomes":
        """Count the rows, (n,) each, in the same order; raises ValueError for unequal lengths."""
        pairs = list(zip(first, second, strict=True))
        return cls(
            *(pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False)))
        )

    @property
    def n(self) -> int:
        """All rows."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def p(self) -> float:
        """McNemar's two-sided mid-p, ``2 P(X < m) + P(X = m)`` for m = min(b, c) and X ~ Binomial(b + c, 1/2).

        That is the doubled exact tail with half of its point probability taken off; 1 for b = c, and so without any
        discordant row. Source: Fagerland, Lydersen, Laake 2013, "The McNemar test for binary matched-pairs data".
        """
        # The exact conditional test counts all of the point probability, which makes it conservative: at a level of 5 %
        # it rejects a true hypothesis in about 2 to 4 of 100 cases and needs more rows for the same power. Mid-p comes close to
        # the level, exceeding it by little if ever.
        discordant, least = self.only_first + self.only_second, min(self.only_first, self.only_second)
        below, term = 0, 1  # Σ_{k<m} C(n, k) and C(n, k), in integers: exact for any number of rows
        for k in range(least):
            below += term
            term = term * (discordant - k) // (k + 1)
        return (2 * below + term) / (1 << discordant)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference by Newcombe's square-and-add of Wilson's limits with correlation; NaN for n = 0.

        Source: Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
        paired data", method 10. It inverts another statistic than :attr:`p`, so at the edge one may exclude 0 alone.
        """
        if not self.n:
            return math.nan, math.nan
        first, second = (
            Proportion(self.both + self.only_first, self.n),
            Proportion(self.both + self.only_second, self.n),
        )
        phi = self._correlation()
        down, up = [], []  # distances of Wilson's limits
        for share in (first, second):
            low, high = share.interval
            down.append(share.value - low)
            up.append(high - share.value)
        value = (self.only_second - self.only_first) / self.n
        return value - _square_and_add(down[1], up[0], phi), value + _square_and_add(up[1], down[0], phi)

    @property
    def difference(self) -> Difference:
        """Difference of the two accuracies with :attr:`interval` and :attr:`p`; NaN for n = 0."""
        value = (self.only_second - self.only_first) / self.n if self.n else math.nan
        return Difference(value, *self.interval, self.p if self.n else math.nan)

    def _correlation(self) -> float:
        """φ of the table with Newcombe's continuity correction of a positive one; 0 when a margin is empty."""
        a, b, c, d = self.both, self.only_first, self.only_second, self.neither
        margins = (a + b) * (c + d) * (a + c) * (b + d)
        numerator: float = a * d - b * c
        if numerator > 0:
            numerator = max(0.0, numerator - self.n / 2)
        return numerator / math.sqrt(margins) if margins else 0.0


def _square_and_add(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def macro_difference(
    tasks: Sequence[PairedOutcomes], rng: np.random.Generator, *, resamples: int = RESAMPLES
) -> Difference:
    """Difference of the mean over tasks of per-task accuracies, by a paired bootstrap stratified by task.

    Rows are drawn in pairs within their task; a draw matters by its cell of the 2 × 2 table alone, so counts are drawn
    instead of rows. NaN interval and p for fewer than 20 rows or a task with a single one; ValueError without tasks.
    """
    if not tasks:
        raise ValueError("a mean over tasks needs at least one task")
    value = sum(t.difference.value for t in tasks) / len(tasks)
    if sum(t.n for t in tasks) < MIN_BOOTSTRAP_ROWS or min(t.n for t in tasks) < 2:
        return Difference(value, math.nan, math.nan, math.nan)
    drawn = np.zeros(resamples)
    for t in tasks:
        # n - 1 draws: n would make the variance of a task's accuracy too small by (n - 1) / n, which does not average
        # out over many small tasks (Efron 1982, section 8; Rao and Wu 1988).
        shares = np.array([t.only_first, t.only_second, t.both + t.neither]) / t.n
        counts = rng.multinomial(t.n - 1, shares, size=resamples)  # (resamples, 3)
        drawn += (counts[:, 1] - counts[:, 0]) / (t.n - 1)
    return _percentile(value, drawn / len(tasks))


def pooled_difference(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    weights: NDArray[np.int64],
    rng: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Difference:
    """Difference of ``Σ values / Σ weights`` over the same rows, by a paired bootstrap of the rows.

    first, second (n,): every row's value under the two runs, such as nats of its right answer; weights (n,): the same for both,
    such as its tokens, or ones for a mean over rows. NaN interval and p for fewer than 20 rows; ValueError for unequal shapes
    or no weight at all.
    """
    if not (first.shape == second.shape == weights.shape) or not weights.sum():
        raise ValueError(
            f"expected three (n,) arrays with weights, got {first.shape}, {second.shape}, {weights.shape}"
        )
    values, n = second - first, len(weights)
    value = float(values.sum() / weights.sum())
    if n < MIN_BOOTSTRAP_ROWS:
        return Difference(value, math.nan, math.nan, math.nan)
    chunk = max(1, _CHUNK // n)
    drawn = []
    for start in range(0, resamples, chunk):
        rows = rng.integers(
            n, size=(min(chunk, resamples - start), n)
        )  # one draw of a row serves both runs: that pairs them
        drawn.append(values[rows].sum(1) / np.maximum(1, weights[rows].sum(1)))
    return _percentile(value, np.concatenate(drawn))


def _percentile(value: float, drawn: NDArray[np.float64]) -> Difference:
    """The percentile interval of ``drawn`` (resamples,), and as p twice the smaller share of resamples beyond 0.

    One resample is added to both shares' numerator and denominator: p = 0 would claim more than finitely many draws can.
    """
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    rounding = 1e-12  # sums of fractions such as 1/10 + 2/10 - 3/10 are 0, not 5e-17
    beyond = min(int((drawn <= rounding).sum()), int((drawn >= -rounding).sum()))
    return Difference(value, float(low), float(high), min(1.0, 2 * (beyond + 1) / (len(drawn) + 1)))
