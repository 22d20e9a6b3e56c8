"""The history of closed and open gates over training, with a bounded number of columns."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_COLUMNS = 200
"""A history that grows beyond this drops every second column."""


@dataclass
class GateShareHistory:
    """The shares of closed and of open gates in each layer, with one column for each recorded training step.

    A long run records only every second, fourth, … measurement. This bounds the size of the history, and the
    total number of recorded columns grows with the logarithm of the length of the run.
    """

    layers: list[int]
    steps: list[int] = field(default_factory=list)
    """The optimizer step of each column."""

    shares: Tensor = field(default_factory=lambda: torch.empty(0))
    """(columns, phases, 2, layers); of the 2, first closed, then open."""

    stride: int = 1
    """One of this many measurements becomes a column."""

    measurements: int = 0
    """The number of measurements offered so far."""

    def add(self, step: int, shares: Tensor) -> bool:
        """Offer a measurement.

        Args:
            step: The current optimizer step.
            shares: (phases, 2, layers), closed and open.

        Returns:
            Whether the measurement became a column.
        """
        due = self.measurements % self.stride == 0
        self.measurements += 1
        if due:
            self.steps = [*self.steps, step]
            self.shares = torch.cat([self.shares.view(-1, *shares.shape), shares.float()[None]])
            if len(self.steps) > MAX_COLUMNS:
                self.steps, self.shares, self.stride = self.steps[::2], self.shares[::2], 2 * self.stride
        return due

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; later measurements do not change it."""
        return {
            "layers": self.layers,
            "steps": self.steps,
            "shares": self.shares,
            "every": self.stride,
            "readings": self.measurements,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "GateShareHistory":
        """Restore a history from :meth:`state_dict`."""
        return cls(state["layers"], state["steps"], state["shares"], state["every"], state["readings"])
