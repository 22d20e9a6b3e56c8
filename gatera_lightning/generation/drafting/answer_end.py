"""Where an answer ends, although a forward pass has given more tokens."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList


@dataclass(frozen=True)
class AnswerEnd:
    """Ends an answer at a token, at a length, or where a criterion of Transformers says so."""

    tokens: Collection[int]
    """Ids that end an answer."""

    limit: int
    """Most tokens of an answer."""

    stopping: StoppingCriteriaList | None = None
    """Criteria that read the token ids of the prompt and the answer, but no scores."""

    def extend(
        self, answer: list[int], chosen: Sequence[int], prompt: Sequence[int] = ()
    ) -> tuple[int, bool]:
        """Add the tokens of a forward pass to an answer, up to its end.

        Args:
            answer: The tokens so far.
            chosen: The tokens that the forward pass gave.
            prompt: What :attr:`stopping` reads before the answer.

        Returns:
            How many tokens were added, and whether the answer has ended.
        """
        for count, token in enumerate(chosen, 1):
            answer.append(token)
            if token in self.tokens or len(answer) == self.limit or self._stops([*prompt, *answer]):
                return count, True
        return len(chosen), False

    def _stops(self, text: list[int]) -> bool:
        if self.stopping is None:
            return False
        scores: Any = None
        return bool(self.stopping(torch.tensor([text]), scores).any())
