"""What all plots of gates share: the color map, texts that can be drawn, and drawing into pixels."""

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORMAP = "cividis"  # perceptually uniform, also for color-blind readers and in grayscale


def drawable(text: str, family: str = "DejaVu Sans") -> str:
    r"""Escape the characters that a font does not have (``\u4f60``); it would draw the same box for each."""
    font = font_manager.get_font(font_manager.findfont(family))
    return "".join(
        character if font.get_char_index(ord(character)) else f"\\u{ord(character):04x}" for character in text
    )


def draw_pixels(figure: Figure) -> np.ndarray:
    """Draw a figure and return its pixels (height, width, 3) as bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
