"""Differences between methods, paired by row within a seed, with intervals over rows and seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gatera_lightning.evaluation.paired_tests import (
    RESAMPLES,
    SIGNIFICANCE_LEVEL,
    Difference,
    holm,
)

__all__ = ["Comparison", "Part", "compare", "correct_for_number", "detectable_difference"]

POWER = 0.8


@dataclass(frozen=True)
class Part:
    """Values of the same rows under several seeds, such as the differences of two methods' losses."""

    values: NDArray[np.float64]
    """(seeds, rows)."""

    weights: NDArray[np.float64]
    """(rows,): the tokens of each row for a loss per token, ones for an accuracy."""

    rows: str = ""
    """Names the rows; parts with the same name have the same rows. Empty if no other part has them."""

    @property
    def means(self) -> NDArray[np.float64]:
        """``Σ values / Σ weights`` of each seed, (seeds,)."""
        means: NDArray[np.float64] = self.values.sum(1) / self.weights.sum()
        return means

    @property
    def mean(self) -> float:
        """``Σ values / Σ weights``, averaged over the seeds."""
        return float(self.means.mean())


@dataclass(frozen=True)
class Comparison:
    """A difference of two methods."""

    difference: Difference
    """Its interval and p-value are NaN with one seed, which says nothing about others."""

    standard_error: float
    """NaN with one seed."""

    degrees_of_freedom: float
    """Of the standard error: few where seeds differ much, since there are few seeds. NaN with one seed."""

    seeds: int


def compare(parts: Sequence[Part], *, resamples: int = RESAMPLES) -> Comparison:
    """Estimate the mean of several parts, and its 95 % interval over seeds and rows.

    The standard error is that of a hierarchical bootstrap. Seeds and rows are crossed: every seed has the
    same rows. A resample draws seeds, and rows that are the same for all seeds (Owen 2007, "The pigeonhole
    bootstrap"). It draws one seed less than there are, since with n of n seeds their variance would be too
    small by a factor of (n − 1)/n (Rao and Wu 1988).

    With three seeds, the resamples' quantiles would be too narrow, because a resample has few ways to draw
    them. The interval is therefore ``mean ± t · SE``, with the degrees of freedom of Satterthwaite (1946):
    ``SE⁴ / (SE_seeds⁴ / (n − 1))``, where ``SE_seeds`` is that of the n seeds' means.

    Args:
        parts: Paired differences, for instance those of each family that was not trained on; all with the
            same seeds.
        resamples: Number of resamples.

    Raises:
        ValueError: If there are no parts, or their seeds differ in number.
    """
    seeds = {len(part.values) for part in parts}
    if len(seeds) != 1:
        raise ValueError(f"compare: parts with {sorted(seeds)} seeds; accepted: one number of seeds")
    (count,) = seeds
    value = sum(part.mean for part in parts) / len(parts)
    nan = float("nan")
    if count < 2:
        return Comparison(Difference(value, nan, nan, nan), nan, nan, count)
    error = float(_resampled_means(parts, count, resamples).std())
    of_seeds = float(np.mean([part.means for part in parts], 0).std(ddof=1)) / math.sqrt(count)
    freedom = (count - 1) * (error / of_seeds) ** 4 if of_seeds > 1e-12 else math.inf
    half = error * float(stats.t.ppf(1 - SIGNIFICANCE_LEVEL / 2, freedom))
    p = float(2 * stats.t.sf(abs(value) / error, freedom)) if error > 1e-12 else float(abs(value) < 1e-12)
    return Comparison(Difference(value, value - half, value + half, p), error, freedom, count)


def _resampled_means(parts: Sequence[Part], seeds: int, resamples: int) -> NDArray[np.float64]:
    """Draw seeds, and the rows of each name, and return the mean of all parts, (resamples,)."""
    rng = np.random.default_rng(0)
    of_seeds = rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=resamples) / (seeds - 1)
    drawn: dict[str, NDArray[np.int64]] = {}
    total = np.zeros(resamples)
    for number, part in enumerate(parts):
        rows, name = len(part.weights), part.rows or f"of part {number}"
        if name not in drawn:
            drawn[name] = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples)  # (resamples, rows)
        sums = ((of_seeds @ part.values) * drawn[name]).sum(1)
        total += sums / np.maximum(1, drawn[name] @ part.weights)
    means: NDArray[np.float64] = total / len(parts)
    return means


def correct_for_number(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Adjust the p-values of comparisons that answer one question together, by Holm's procedure."""
    adjusted = holm([comparison.difference for comparison in comparisons])
    return [
        replace(comparison, difference=difference)
        for difference, comparison in zip(adjusted, comparisons, strict=True)
    ]


def detectable_difference(comparison: Comparison, comparisons: int) -> float:
    """Return the smallest true difference that is found with a probability of 80 %.

    ``(t_{1 − α/2m} + t_{0.8}) · SE`` with m comparisons, at the level that Holm's procedure starts with.

    Args:
        comparison: Its standard error and its degrees of freedom.
        comparisons: m.
    """
    level = SIGNIFICANCE_LEVEL / (2 * max(1, comparisons))
    quantiles = stats.t.ppf(1 - level, comparison.degrees_of_freedom) + stats.t.ppf(
        POWER, comparison.degrees_of_freedom
    )
    return float(quantiles * comparison.standard_error)
