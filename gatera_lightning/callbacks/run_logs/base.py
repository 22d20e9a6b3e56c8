"""What callbacks log besides Lightning's metrics, and the contract of a logger that shows it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Histogram:
    """Counts of values between 0 and 1, with their sums."""

    limits: Sequence[float]
    """The upper limit of each bin, ascending; the first bin starts at 0."""

    counts: Sequence[float]
    """The number of values in each bin."""

    total: float
    """The sum of the values."""

    squares: float
    """The sum of their squares."""


class RunLog(ABC):
    """A logger of a run, as callbacks write to it. Only rank 0 writes."""

    @abstractmethod
    def log_statistics(
        self, scalars: Mapping[str, float], histograms: Mapping[str, Histogram], step: int
    ) -> None:
        """Log scalars and histograms.

        Args:
            scalars: Tag -> value.
            histograms: Tag -> histogram.
            step: The optimizer step.
        """

    @abstractmethod
    def log_picture(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Log a picture.

        Args:
            tag: Name of the picture.
            pixels: (height, width, 3), bytes.
            step: The optimizer step.
        """

    @abstractmethod
    def log_html(self, tag: str, text: str, step: int) -> None:
        """Log a text.

        Args:
            tag: Name of the text.
            text: The text, with ``blockquote``, ``p``, ``br`` and ``strong`` as markup.
            step: The optimizer step.
        """
