"""Which tokens of a sequence are supervised, i.e. predicted under the loss."""

from collections.abc import Sequence
from typing import Literal

TrainOn = Literal["response", "every_response", "all"]
"""Supervise the answer, the earlier responses of a conversation too, or the whole prompt too."""


def supervised_ranges(
    prompt_length: int, length: int, earlier_responses: Sequence[Sequence[int]], train_on: TrainOn
) -> list[tuple[int, int]]:
    """Return the ranges ``(start, end)`` of supervised tokens in a sequence.

    The first token of a sequence has no predecessor that could predict it, so it is never supervised.

    Args:
        prompt_length: Tokens of the prompt.
        length: Tokens of prompt and answer.
        earlier_responses: Token ranges ``(start, end)`` of earlier responses in the prompt.
        train_on: Which parts are supervised.
    """
    if train_on == "all":
        return [(1, length)]
    answer = (prompt_length, length)
    responses = [*earlier_responses, answer] if train_on == "every_response" else [answer]
    return [(max(1, start), end) for start, end in responses]
