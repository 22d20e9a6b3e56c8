"""Tests of text on the colors of its gates."""

import numpy as np
from matplotlib import colormaps

from gatera_lightning.gate_analysis.plots.canvas import draw_pixels
from gatera_lightning.gate_analysis.plots.colored_text import draw_colored_text


def test_colored_text_draws_each_token_on_its_color():
    gates = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    picture = draw_pixels(draw_colored_text([" a", " b↵", " $c", " d", " e"], gates, 2, "step 1"))
    colors, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    areas = dict(zip(map(tuple, colors.tolist()), counts.tolist(), strict=True))
    for gate in gates:
        red, green, blue = (round(255 * part) for part in colormaps["cividis"](gate)[:3])
        assert areas.get((red, green, blue), 0) > 80, gate
