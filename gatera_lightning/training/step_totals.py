"""Sum what the micro-batches of one optimizer step contribute to its loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from gatera_lightning.objectives.base import MicroBatchLoss, weighted_sum


class StepTotals:
    """The terms of one optimizer step, summed over this rank's micro-batches until :meth:`clear`."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (terms,)
        self._weights: dict[str, float] = {}

    def add(self, found: MicroBatchLoss) -> None:
        """Add one micro-batch.

        Raises:
            RuntimeError: If its terms are not those of the micro-batch before it. Ranks add their terms by
                position.
        """
        if self._weights and self._weights.keys() != found.weights.keys():
            raise RuntimeError(
                f"the objectives returned the terms {list(found.weights)}, and {list(self._weights)} for an "
                "earlier micro-batch; return every term every time, with a total of 0 if it has no elements"
            )
        values = torch.stack(list(found.values.values()))
        self._sums = values if self._sums is None else self._sums.to(values.device) + values
        self._weights = found.weights

    def reduce(
        self, squares: Tensor, add_ranks: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Sum the step over ranks, in one communication.

        Args:
            squares: This rank's part of the squared gradient norms (groups,).
            add_ranks: Sums a tensor over ranks.

        Returns:
            The loss of the step, the value of each term, and the squared gradient norms (groups,).
        """
        assert self._sums is not None  # a micro-batch precedes every optimizer step
        sums = add_ranks(torch.cat([self._sums, squares.to(self._sums)]))
        values = dict(zip(self._weights, sums.unbind(), strict=False))
        return weighted_sum(values, self._weights), values, sums[len(values) :]

    def clear(self) -> None:
        """Start the next step."""
        self._sums = None
