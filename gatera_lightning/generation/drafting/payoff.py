"""Decide whether drafts pay: a forward pass with more rows takes longer than one with a single row."""

import statistics
import time
from collections.abc import Callable

_PLAIN = 4
"""Forward passes without drafts that each decision compares with; the median ignores a slow one."""

_KEPT = 2
"""How many of them the next decision uses again; it measures the others again, since texts grow longer."""

_SAMPLES = 24
"""Passes with drafts before each decision; one that 4 prompts share counts as 4."""

_PASSES = 6
"""Fewest passes with drafts before each decision; their medians ignore a slow one."""


class Payoff:
    """Compares the seconds per token with and without drafts, and turns drafts off for good if they lose.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = 0.0
        self._plain: list[float] = []
        self._seconds: dict[tuple[int, int], list[float]] = {}
        self._tokens, self._samples = 0.0, 0
        self.verdict: str | None = None

    @property
    def allows_drafts(self) -> bool:
        """Whether the next forward pass may draft."""
        return len(self._plain) >= _PLAIN and self.verdict is None

    def start(self) -> None:
        """Note that a forward pass starts."""
        self._started = self._clock()

    def stop(self, tokens: int, *, prompts: int = 1, drafts: int, noise: int) -> None:
        """Note that a forward pass has ended, and its tokens are chosen.

        Args:
            tokens: How many tokens it gave, to all prompts.
            prompts: How many prompts shared it.
            drafts: How many drafts it verified for each prompt.
            noise: How many drafts it made for each prompt.
        """
        seconds = self._clock() - self._started
        if not (drafts or noise):
            self._plain = [*self._plain, seconds][-_PLAIN:]
            return
        self._seconds.setdefault((drafts, noise), []).append(seconds)
        self._tokens += tokens / prompts
        self._samples += prompts
        # A cycle is measured whole: the pass that verifies drafts gives more tokens than the one before it.
        is_within_cycle = noise > 0 and not drafts
        if self._samples >= _SAMPLES and self._passes >= _PASSES and not is_within_cycle:
            self._decide()

    @property
    def _passes(self) -> int:
        return sum(map(len, self._seconds.values()))

    def _decide(self) -> None:
        """Keep drafts if their tokens take less time; else say why not."""
        per_forward = self._tokens / self._passes
        # Passes with other rows take another time, so each kind has a median of its own.
        seconds = sum(len(passes) * statistics.median(passes) for passes in self._seconds.values())
        relative = seconds / self._passes / statistics.median(self._plain)
        if per_forward < relative:
            self.verdict = (
                f"drafts turned off: a forward pass with drafts gave {per_forward:.2f} tokens, and took "
                f"{relative:.2f} times as long as one without"
            )
        self._seconds, self._tokens, self._samples = {}, 0.0, 0
        self._plain = self._plain[-_KEPT:]
