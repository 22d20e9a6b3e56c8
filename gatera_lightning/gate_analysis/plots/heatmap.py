"""Layer × token heatmaps: the mean gate of a layer's modules at each token (as figure 1 of GateRA, AAAI 2026)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gatera_lightning.gate_analysis.capture import GatedModule

COLOURS = "cividis"  # even to the colour-blind, and in grey


def by_layer(modules: Sequence[GatedModule], gates: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Mean over the modules of each layer, gates (modules, tokens) -> layers, (layers, tokens)."""
    numbers = np.array([module.layer for module in modules])
    layers = sorted(set(numbers.tolist()))
    return layers, np.stack([gates[numbers == layer].mean(0, dtype=float) for layer in layers])


def draw_heatmap(
    modules: Sequence[GatedModule], gates: np.ndarray, tokens: Sequence[str], prompt: int, title: str
) -> Figure:
    """One text: gates (modules, tokens), a label a token, a line where the response begins."""
    layers, means = by_layer(modules, gates)
    figure = Figure(
        figsize=(2.2 + 0.19 * len(tokens), 1.8 + 0.13 * len(layers)), layout="constrained", dpi=110
    )
    axes = figure.subplots()
    image = axes.imshow(
        means, aspect="auto", cmap=COLOURS, vmin=0, vmax=1, origin="lower", interpolation="nearest"
    )
    axes.set_xticks(range(len(tokens)), list(tokens), rotation=90)
    for label in axes.get_xticklabels():
        label.set_parse_math(False)  # a token may be a dollar sign
    axes.tick_params(labelsize=7)
    step = max(1, len(layers) // 10)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("layer")
    if 0 < prompt < len(tokens):
        axes.axvline(prompt - 0.5, color="white", linewidth=1.5)
        axes.axvline(prompt - 0.5, color="black", linewidth=0.7, linestyle=":")
    axes.set_title(title, fontsize=9, loc="left")
    figure.colorbar(image, ax=axes, label="mean gate", pad=0.01)
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """The figure as (height, width, 3) bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
