"""Tests of the plot of gate shares over training, by its pixels."""

import math

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from gatera_lightning.gate_analysis.history import MAX_COLUMNS, GateShareHistory
from gatera_lightning.gate_analysis.plots.canvas import COLORMAP, draw_pixels
from gatera_lightning.gate_analysis.plots.gate_shares import draw_gate_shares


def panel(figure, label):
    """The inner pixels of the panel with a label, and the position of its lower left corner."""
    (axes,) = (
        axes for axes in figure.axes if [text.get_text().startswith(label) for text in axes.texts] == [True]
    )
    picture = draw_pixels(figure)
    size = np.array(picture.shape[1::-1])
    (left, bottom), (right, top) = axes.get_position().get_points() * size
    inner = picture[int(size[1] - top) + 3 : int(size[1] - bottom) - 3, int(left) + 3 : int(right) - 3]
    return inner, (left, bottom)


def color(share):
    return np.array(colormaps[COLORMAP](share)[:3]) * 255


def test_plot_has_closed_above_open_and_prompt_left_of_response():
    history = GateShareHistory(list(range(4)))
    shares = torch.tensor([[0.1, 0.35], [0.6, 0.9]])  # (phases, closed and open)
    for step in (10, 20, 30):
        history.add(step, shares[:, :, None].expand(2, 2, 4))
    figure = draw_gate_shares(history)
    places = {}
    for phase, of_phase in zip(("prompt", "response"), shares.tolist(), strict=True):
        for share, value in zip(("closed", "open"), of_phase, strict=True):
            inner, places[phase, share] = panel(figure, f"{phase}, {share}")
            np.testing.assert_allclose(inner, np.broadcast_to(color(value), inner.shape), atol=2)
    (left, upper), (right, lower) = places["prompt", "closed"], places["response", "open"]
    assert left < right
    assert upper > lower
    assert places["prompt", "open"] == (left, lower)


def test_plot_has_steps_to_the_right_and_layers_upwards():
    """The share is 1 in the last layer at the third of three steps, and 0 elsewhere; no tokens are white."""
    history = GateShareHistory([3, 7, 12, 40])
    for step in (10, 20, 30):
        shares = torch.zeros(2, 2, 4)
        shares[:, :, 3] = float(step == 30)
        shares[1] = math.nan
        history.add(step, shares)
    figure = draw_gate_shares(history)
    closed, _ = panel(figure, "prompt, closed")
    height, width, _ = closed.shape
    bright = np.abs(closed - color(1.0)).max(-1) < 3
    assert bright[: height // 4 - 5, 2 * width // 3 + 5 :].all()
    assert not bright[height // 4 + 5 :].any()
    assert not bright[:, : 2 * width // 3 - 5].any()
    assert (panel(figure, "response, open")[0] == 255).all()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["3", "7", "12", "40"]


@pytest.mark.parametrize(("layers", "columns"), [(1, 1), (32, 150), (80, MAX_COLUMNS)])
def test_plot_fits_on_a_page(layers, columns):
    history = GateShareHistory(list(range(layers)))
    for i in range(columns):
        history.add(50 * (i + 1), torch.full((2, 2, layers), float(i)))
    height, width, channels = draw_pixels(draw_gate_shares(history)).shape
    assert (width, channels) == (900, 3)
    assert 300 <= height <= 920
