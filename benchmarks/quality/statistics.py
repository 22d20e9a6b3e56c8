"""Differences between methods, paired by row within a seed, with intervals over rows and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

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

    @property
    def mean(self) -> float:
        """``Σ values / Σ weights``, averaged over the seeds."""
        return float(self.values.mean(0).sum() / self.weights.sum())


@dataclass(frozen=True)
class Comparison:
    """A difference of two methods."""

    difference: Difference
    """Its interval and p-value are NaN with one seed, which says nothing about others."""

    standard_error: float
    """NaN with one seed."""

    seeds: int


def compare(parts: Sequence[Part], *, resamples: int = RESAMPLES) -> Comparison:
    """Estimate the mean of several parts, and its 95 % interval by a hierarchical bootstrap.

    Seeds and rows are crossed: every seed has the same rows. A resample draws seeds, and rows of each part
    that are the same for all seeds (Owen 2007, "The pigeonhole bootstrap"). It draws one seed less than there
    are, since with n of n seeds their variance would be too small by a factor of (n − 1)/n (Rao and Wu 1988).

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
        return Comparison(Difference(value, nan, nan, nan), nan, count)
    rng = np.random.default_rng(0)
    of_seeds = rng.multinomial(count - 1, np.full(count, 1 / count), size=resamples) / (count - 1)
    drawn = np.zeros(resamples)
    for part in parts:
        rows = len(part.weights)
        of_rows = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples)  # (resamples, rows)
        totals = ((of_seeds @ part.values) * of_rows).sum(1)
        drawn += totals / np.maximum(1, of_rows @ part.weights)
    drawn /= len(parts)
    low, high = np.quantile(drawn, [SIGNIFICANCE_LEVEL / 2, 1 - SIGNIFICANCE_LEVEL / 2])
    beyond = min(int((drawn <= 1e-12).sum()), int((drawn >= -1e-12).sum()))
    p = min(1.0, 2 * (beyond + 1) / (resamples + 1))
    return Comparison(Difference(value, float(low), float(high), p), float(drawn.std()), count)


def correct_for_number(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Adjust the p-values of comparisons that answer one question together, by Holm's procedure."""
    adjusted = holm([comparison.difference for comparison in comparisons])
    return [
        Comparison(difference, comparison.standard_error, comparison.seeds)
        for difference, comparison in zip(adjusted, comparisons, strict=True)
    ]


def detectable_difference(standard_error: float, comparisons: int) -> float:
    """Return the smallest true difference that is found with a probability of 80 %.

    ``(z_{1 − α/2m} + z_{0.8}) · SE`` with m comparisons, at the level that Holm's procedure starts with.

    Args:
        standard_error: Standard error of a difference.
        comparisons: m.
    """
    normal = NormalDist()
    level = SIGNIFICANCE_LEVEL / (2 * max(1, comparisons))
    return (normal.inv_cdf(1 - level) + normal.inv_cdf(POWER)) * standard_error
