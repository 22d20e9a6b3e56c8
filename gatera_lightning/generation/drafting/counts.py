"""Count what drafting saves."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Self


@dataclass
class DraftCounts:
    """Forward passes, tokens and accepted drafts of all answers so far."""

    forwards: int = 0
    """Forward passes of the model, with those that read prompts."""

    tokens: int = 0
    """Generated tokens."""

    verified: Counter[int] = field(default_factory=Counter)
    """Drafts that a forward pass verified, by their depth: 1 for the first draft of a block."""

    accepted: Counter[int] = field(default_factory=Counter)
    """Drafts that were accepted, by depth; a draft after a rejected one is not."""

    def add(self, tokens: int, *, drafts: int, accepted: int) -> None:
        """Add a forward pass of one prompt.

        Args:
            tokens: How many of its tokens became part of the answer. Drafts after its end are not counted.
            drafts: How many drafts it verified.
            accepted: How many of these, from the first one, were accepted.
        """
        if tokens <= accepted:  # the answer ended with an accepted draft
            drafts = accepted = tokens
        self.forwards += 1
        self.tokens += tokens
        self.verified.update(range(1, drafts + 1))
        self.accepted.update(range(1, accepted + 1))

    def add_plain(self, tokens: int) -> None:
        """Add an answer that was decoded without drafts, with a forward pass for each of its tokens."""
        self.forwards += tokens
        self.tokens += tokens

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.verified + other.verified,
            self.accepted + other.accepted,
        )

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens per forward pass; plain decoding has 1."""
        return self.tokens / self.forwards if self.forwards else 0.0

    def acceptance(self) -> dict[int, float]:
        """Return the share of accepted drafts by depth."""
        return {depth: self.accepted[depth] / count for depth, count in sorted(self.verified.items())}

    def __str__(self) -> str:
        text = (
            f"{self.tokens} tokens in {self.forwards} forward passes "
            f"({self.tokens_per_forward:.2f} tokens a forward pass)"
        )
        shares = ", ".join(f"{share:.0%}" for share in self.acceptance().values())
        return f"{text}; accepted drafts by depth: {shares}" if shares else text
