"""How sure one may be of a share: Wilson's score interval."""

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
        half = _Z95 * math.sqrt(self.value * (1 - self.value) / self.n + z2 / (4 * self.n**2)) / (1 + z2 / self.n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"
