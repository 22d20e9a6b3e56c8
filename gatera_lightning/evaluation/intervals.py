"""How sure one may be of a share, and of the mean of several: Wilson's score interval, and what follows from it."""

import math
from dataclasses import dataclass

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Proportion:
    """``hits`` out of ``n``."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The share; NaN for n = 0."""
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval (1927), which stays inside [0, 1] and holds for small n; NaN for n = 0."""
        if not self.n:
            return math.nan, math.nan
        z2 = _Z95**2
        centre = (self.hits + z2 / 2) / (self.n + z2)
        half = (
            _Z95
            * math.sqrt(self.value * (1 - self.value) / self.n + z2 / (4 * self.n**2))
            / (1 + z2 / self.n)
        )
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Average:
    """The mean of several independent shares, each counting alike."""

    parts: tuple[Proportion, ...]

    @property
    def value(self) -> float:
        """The mean; NaN without parts, or where one has n = 0."""
        return sum(part.value for part in self.parts) / len(self.parts) if self.parts else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval by recovering variances from the parts' Wilson limits (Zou & Donner 2008); NaN where the mean is."""
        if math.isnan(self.value):
            return math.nan, math.nan
        below = math.sqrt(sum((part.value - part.interval[0]) ** 2 for part in self.parts)) / len(self.parts)
        above = math.sqrt(sum((part.interval[1] - part.value) ** 2 for part in self.parts)) / len(self.parts)
        return max(0.0, self.value - below), min(1.0, self.value + above)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"
