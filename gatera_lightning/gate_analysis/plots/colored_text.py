"""Text with each token on the color of its gate, for a terminal or as a picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from gatera_lightning.gate_analysis.plots.canvas import COLORMAP, drawable

_FONT = "DejaVu Sans Mono"
_LINE_CELLS = 100
_CELL_INCHES = (0.0756, 0.19)  # width of a 9-point DejaVu Sans Mono character, and height of a line


def gate_colors(gate: float) -> tuple[str, str]:
    """Return the background color of a gate in [0, 1], and black or white for the text on it."""
    red, green, blue, _ = colormaps[COLORMAP](gate)
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    foreground = "#000000" if luminance > 0.18 else "#ffffff"  # at 0.18, both have equal contrast (WCAG)
    return to_hex((red, green, blue)), foreground


def color_by_gate(piece: str, gate: float) -> Text:
    """Color a piece of text for a terminal.

    A line break is shown as ``↵``, and no color extends beyond the text to the end of the line.

    Args:
        piece: The text.
        gate: Its gate in [0, 1].
    """
    background, foreground = gate_colors(gate)
    style = Style(color=foreground, bgcolor=background)
    text = Text()
    for number, line in enumerate(piece.split("\n")):
        text.append("↵" if number else "", style).append("\n" if number else "").append(line, style)
    return text


def color_scale() -> Text:
    """Return the color scale from 0 to 1, for a terminal."""
    return Text(" ").join(color_by_gate(f" {gate / 10:.1f} ", gate / 10) for gate in range(11))


def draw_colored_text(labels: Sequence[str], gates: np.ndarray, prompt_length: int, title: str) -> Figure:
    """Draw a text with each token on the color of its gate; a dotted line separates prompt and response.

    Args:
        labels: A label for each token.
        gates: (tokens,)
        prompt_length: The number of prompt tokens.
        title: The title of the picture.
    """
    labels = [drawable(label, _FONT) for label in labels]
    places: list[tuple[int, float, int]] = []  # (column, line, cells) of each token
    column, line, separator = 0, 0.0, None
    for number, label in enumerate(labels):
        cells = cell_len(label)
        if number == prompt_length and number:
            column, separator, line = 0, line + 1.25, line + 1.5
        elif column + cells > _LINE_CELLS and column:
            column, line = 0, line + 1
        places.append((column, line, cells))
        column += cells
        if label.endswith("↵"):
            column, line = 0, line + 1
    width = max(column + cells for column, _, cells in places)
    height = places[-1][1] + 1
    text_width, text_height = width * _CELL_INCHES[0], height * _CELL_INCHES[1]
    size = max(text_width, 4) + 0.2, text_height + 1.05
    figure = Figure(figsize=size, dpi=110)
    axes = figure.add_axes((0.1 / size[0], 0.7 / size[1], text_width / size[0], text_height / size[1]))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for label, gate, (column, line, cells) in zip(labels, gates, places, strict=True):
        background, foreground = gate_colors(float(gate))
        axes.add_patch(Rectangle((column, line + 0.04), cells, 0.92, facecolor=background, linewidth=0))
        axes.text(
            column,
            line + 0.5,
            label,
            color=foreground,
            family=_FONT,
            size=9,
            va="center",
            parse_math=False,
        )
    if separator is not None:
        axes.plot(
            [0, width], [separator, separator], color="black", linewidth=0.7, linestyle=":", clip_on=False
        )
    figure.text(0.1 / size[0], 1 - 0.22 / size[1], drawable(title), size=9, parse_math=False)
    scale = figure.add_axes((0.1 / size[0], 0.42 / size[1], 2 / size[0], 0.12 / size[1]))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLORMAP), cax=scale, orientation="horizontal")
    bar.set_label("mean gate", size=8, labelpad=1)
    bar.ax.tick_params(labelsize=7)
    return figure
