"""95 % confidence intervals of an accuracy and of the mean of several accuracies."""

import math
from dataclasses import dataclass

_Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Proportion:
    """A binomial proportion: ``hits`` successes in ``n`` trials, such as an accuracy."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """``hits / n``; NaN for n = 0."""
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval at 95 %; (NaN, NaN) for n = 0.

        With p = hits / n and z = 1.96::

            (p + z²/2n ± z · sqrt(p (1 − p) / n + z²/4n²)) / (1 + z²/n)

        The interval stays inside [0, 1] and is accurate for small n, unlike p ± z · sqrt(p (1 − p) / n).
        Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
        """
        if not self.n:
            return math.nan, math.nan
        z2 = _Z95**2
        center = (self.hits + z2 / 2) / (self.n + z2)
        spread = math.sqrt(self.value * (1 - self.value) / self.n + z2 / (4 * self.n**2))
        half = _Z95 * spread / (1 + z2 / self.n)
        return max(0.0, center - half), min(1.0, center + half)

    def __str__(self) -> str:
        return _format(self.value, self.interval)


@dataclass(frozen=True)
class Average:
    """Unweighted mean of independent proportions, such as the average accuracy over tasks."""

    parts: tuple[Proportion, ...]

    @property
    def value(self) -> float:
        """The mean; NaN without parts, or where a part has n = 0."""
        return sum(part.value for part in self.parts) / len(self.parts) if self.parts else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval from the Wilson limits of the parts (MOVER); (NaN, NaN) where the mean is NaN.

        For k parts with values pᵢ and Wilson limits lᵢ, uᵢ::

            [mean − sqrt(Σ (pᵢ − lᵢ)²) / k,  mean + sqrt(Σ (uᵢ − pᵢ)²) / k]

        Source: Zou and Donner 2008, "Construction of confidence limits about effect measures: a general
        approach" (method of variance estimates recovery).
        """
        if math.isnan(self.value):
            return math.nan, math.nan
        below = math.sqrt(sum((part.value - part.interval[0]) ** 2 for part in self.parts)) / len(self.parts)
        above = math.sqrt(sum((part.interval[1] - part.value) ** 2 for part in self.parts)) / len(self.parts)
        return max(0.0, self.value - below), min(1.0, self.value + above)

    def __str__(self) -> str:
        return _format(self.value, self.interval)


def _format(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
