"""The plot of closed and open gates over training."""

import numpy as np
from matplotlib.figure import Figure

from gatera_lightning.gate_analysis.history import GateShareHistory
from gatera_lightning.gate_analysis.plots.canvas import COLORMAP
from gatera_lightning.gate_analysis.statistics import PHASES


def draw_gate_shares(history: GateShareHistory) -> Figure:
    """Draw the history of gate shares as four layer × optimizer step panels.

    The upper panels show closed gates, the lower ones open gates; the left panels prompt tokens, the right
    ones response tokens. A column extends from the previous recorded step to its own. White means that there
    were no tokens.
    """
    steps, layers = history.steps, history.layers
    first = 2 * steps[0] - steps[1] if len(steps) > 1 else 0
    edges = np.array([max(0, first), *steps])
    tick_step = max(1, len(layers) // 5)
    panel = min(4.0, max(1.2, 0.12 * len(layers)))  # inches
    height = 2 * panel + 1.2
    figure = Figure(figsize=(9, height), dpi=100)
    # Axes are placed and labeled by hand: matplotlib's layout engine would take longer than all the rest.
    for row, share in enumerate(("open (g ≥ 0.9)", "closed (g < 0.1)")):  # from the bottom
        for column, phase in enumerate(PHASES):
            bottom = 0.5 + row * (panel + 0.35)
            axes = figure.add_axes((0.07 + 0.43 * column, bottom / height, 0.41, panel / height))
            values = history.shares[:, column, 1 - row].T.numpy()  # (layers, columns)
            image = axes.pcolormesh(
                edges, np.arange(len(layers) + 1) - 0.5, values, cmap=COLORMAP, vmin=0, vmax=1
            )
            axes.text(0, 1.03, f"{phase}, {share}", fontsize=9, transform=axes.transAxes)
            axes.set_yticks(range(0, len(layers), tick_step), [str(layer) for layer in layers[::tick_step]])
            axes.locator_params(axis="x", nbins=5)
            axes.tick_params(labelsize=7, labelleft=column == 0, labelbottom=row == 0)
            axes.set_ylabel("" if column else "layer", fontsize=8)
            axes.set_xlabel("" if row else "optimizer step", fontsize=8)
    scale = figure.add_axes((0.93, 0.5 / height, 0.015, 1 - 0.85 / height))
    figure.colorbar(image, cax=scale).ax.tick_params(labelsize=7)
    return figure
