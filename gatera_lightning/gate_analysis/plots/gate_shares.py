"""Closed and open gates of every layer as training goes on: a history of bounded length, and its picture."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from gatera_lightning.gate_analysis.plots.heatmap import COLOURS
from gatera_lightning.gate_analysis.statistics import PHASES

LONGEST = 200
"""Columns of a history; a longer one loses every second."""


@dataclass
class ShareHistory:
    """Shares of closed and of open gates, a column for each reading; of a long run, for every second, fourth, … reading.

    So its size is bounded, and the number of columns that are ever added grows with the logarithm of a run's length.
    """

    layers: list[int]
    steps: list[int] = field(default_factory=list)
    """The optimizer step at which a column was read."""

    shares: Tensor = field(default_factory=lambda: torch.empty(0))
    """(columns, phases, 2, layers): closed, open."""

    every: int = 1
    """One reading of so many becomes a column."""

    readings: int = 0

    def add(self, step: int, shares: Tensor) -> bool:
        """Offer a reading (phases, 2, layers); whether it became a column."""
        due = self.readings % self.every == 0
        self.readings += 1
        if due:
            self.steps = [*self.steps, step]
            self.shares = torch.cat([self.shares.view(-1, *shares.shape), shares.float()[None]])
            if len(self.steps) > LONGEST:
                self.steps, self.shares, self.every = self.steps[::2], self.shares[::2], 2 * self.every
        return due

    def state(self) -> dict[str, Any]:
        """What makes the same history again, as ``ShareHistory(**state)``; later readings do not change it."""
        return dict(vars(self))


def draw_shares(history: ShareHistory) -> Figure:
    """Layer × optimizer step: closed gates above, open ones below, prompt tokens left, those of the response right.

    A column reaches from the step of the one before to its own; white means that there were no tokens.
    """
    steps, layers = history.steps, history.layers
    first = 2 * steps[0] - steps[1] if len(steps) > 1 else 0
    edges = np.array([max(0, first), *steps])
    every = max(1, len(layers) // 5)
    panel = min(4.0, max(1.2, 0.12 * len(layers)))  # inches
    height = 2 * panel + 1.2
    figure = Figure(figsize=(9, height), dpi=100)
    # Placed and labelled by hand: matplotlib's layout and titles would take longer than all the rest.
    for row, share in enumerate(("open (g ≥ 0.9)", "closed (g < 0.1)")):  # from below
        for column, phase in enumerate(PHASES):
            bottom = 0.5 + row * (panel + 0.35)
            axes = figure.add_axes((0.07 + 0.43 * column, bottom / height, 0.41, panel / height))
            values = history.shares[:, column, 1 - row].T.numpy()  # (layers, columns)
            image = axes.pcolormesh(
                edges, np.arange(len(layers) + 1) - 0.5, values, cmap=COLOURS, vmin=0, vmax=1
            )
            axes.text(0, 1.03, f"{phase}, {share}", fontsize=9, transform=axes.transAxes)
            axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
            axes.locator_params(axis="x", nbins=5)
            axes.tick_params(labelsize=7, labelleft=column == 0, labelbottom=row == 0)
            axes.set_ylabel("" if column else "layer", fontsize=8)
            axes.set_xlabel("" if row else "optimizer step", fontsize=8)
    scale = figure.add_axes((0.93, 0.5 / height, 0.015, 1 - 0.85 / height))
    figure.colorbar(image, cax=scale).ax.tick_params(labelsize=7)
    return figure
