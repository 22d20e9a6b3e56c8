"""What all plots of gates share: the color map, and drawing a figure into pixels."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORMAP = "cividis"  # perceptually uniform, also for color-blind readers and in grayscale


def draw_pixels(figure: Figure) -> np.ndarray:
    """Draw a figure and return its pixels (height, width, 3) as bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
