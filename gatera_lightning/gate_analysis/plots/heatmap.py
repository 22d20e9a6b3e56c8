"""Layer × token heatmaps: the mean gate of each layer at each token (as figure 1 of GateRA, AAAI 2026)."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.plots.canvas import COLORMAP, drawable
from gatera_lightning.gate_analysis.statistics import mean_by_layer

_MOST_INCHES = 550.0  # matplotlib draws at most 65,535 pixels in each direction


def draw_heatmap(
    modules: Sequence[GatedModule], gates: np.ndarray, labels: Sequence[str], prompt_length: int, title: str
) -> Figure:
    """Draw the gates of one text.

    Args:
        modules: The gated modules; the plot averages the modules of a layer.
        gates: (modules, tokens)
        labels: A label for each token.
        prompt_length: The number of prompt tokens; a line marks where the response begins.
        title: The title of the plot.

    Returns:
        A figure with one row for each layer (the first at the bottom) and one column for each token.
    """
    layers, means = mean_by_layer(modules, gates)
    width, height = 0.19 * len(labels), 0.13 * len(layers)
    figure = Figure(
        figsize=(2.2 + min(width, _MOST_INCHES), 1.8 + min(height, _MOST_INCHES)),
        layout="constrained",
        dpi=110,
    )
    axes = figure.subplots()
    image = axes.imshow(
        means, aspect="auto", cmap=COLORMAP, vmin=0, vmax=1, origin="lower", interpolation="nearest"
    )
    every = max(1, math.ceil(width / _MOST_INCHES))  # a label has room if columns have their usual width
    shown = [drawable(label) for label in labels[::every]]
    axes.set_xticks(range(0, len(labels), every), shown, rotation=90)
    for label in axes.get_xticklabels():
        label.set_parse_math(False)  # a token may be a dollar sign
    axes.tick_params(labelsize=7)
    step = max(1, len(layers) // 10)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("layer")
    if 0 < prompt_length < len(labels):
        axes.axvline(prompt_length - 0.5, color="white", linewidth=1.5)
        axes.axvline(prompt_length - 0.5, color="black", linewidth=0.7, linestyle=":")
    axes.set_title(drawable(title), fontsize=9, loc="left", parse_math=False)
    figure.colorbar(image, ax=axes, label="mean gate", pad=0.01)
    return figure
