"""Text on the colours of its tokens' gates: for a terminal, and as a picture."""

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

from gatera_lightning.gate_analysis.plots.heatmap import COLOURS

_COLUMNS = 100
_CELL = (0.0756, 0.19)  # inches that a character of DejaVu Sans Mono takes at 9 points, and a line


def colours(gate: float) -> tuple[str, str]:
    """The colour of a gate in [0, 1], and black or white, whichever can be read on it."""
    red, green, blue, _ = colormaps[COLOURS](gate)
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return to_hex(
        (red, green, blue)
    ), "#000000" if luminance > 0.18 else "#ffffff"  # equal contrast with both (WCAG)


def coloured(piece: str, gate: float) -> Text:
    """A piece of text for a terminal; a line break shows as ``↵``, and no colour runs to the end of its line."""
    background, foreground = colours(gate)
    style = Style(color=foreground, bgcolor=background)
    text = Text()
    for number, line in enumerate(piece.split("\n")):
        text.append("↵" if number else "", style).append("\n" if number else "").append(line, style)
    return text


def legend() -> Text:
    """The scale from 0 to 1, for a terminal."""
    return Text(" ").join(coloured(f" {gate / 10:.1f} ", gate / 10) for gate in range(11))


def draw_text(tokens: Sequence[str], gates: np.ndarray, prompt: int, title: str) -> Figure:
    """A label a token on the colour of its gate, gates (tokens,), in lines; the response, from ``prompt`` on, below a rule."""
    places: list[tuple[int, float, int]] = []  # column, line, cells
    column, line, rule = 0, 0.0, None
    for number, token in enumerate(tokens):
        cells = cell_len(token)
        if number == prompt and number:
            column, rule, line = 0, line + 1.25, line + 1.5
        elif column + cells > _COLUMNS and column:
            column, line = 0, line + 1
        places.append((column, line, cells))
        column += cells
        if token.endswith("↵"):
            column, line = 0, line + 1
    width = max(column + cells for column, _, cells in places)
    height = places[-1][1] + 1
    across, down = width * _CELL[0], height * _CELL[1]
    size = max(across, 4) + 0.2, down + 1.05
    figure = Figure(figsize=size, dpi=110)
    axes = figure.add_axes((0.1 / size[0], 0.7 / size[1], across / size[0], down / size[1]))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for token, gate, (column, line, cells) in zip(tokens, gates, places, strict=True):
        background, foreground = colours(float(gate))
        axes.add_patch(Rectangle((column, line + 0.04), cells, 0.92, facecolor=background, linewidth=0))
        axes.text(
            column,
            line + 0.5,
            token,
            color=foreground,
            family="DejaVu Sans Mono",
            size=9,
            va="center",
            parse_math=False,
        )
    if rule is not None:
        axes.plot([0, width], [rule, rule], color="black", linewidth=0.7, linestyle=":", clip_on=False)
    figure.text(0.1 / size[0], 1 - 0.22 / size[1], title, size=9)
    scale = figure.add_axes((0.1 / size[0], 0.42 / size[1], 2 / size[0], 0.12 / size[1]))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), cax=scale, orientation="horizontal")
    bar.set_label("mean gate", size=8, labelpad=1)
    bar.ax.tick_params(labelsize=7)
    return figure
