"""Shares over time: which readings a long history keeps, and what its picture shows where."""

import math

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from gatera_lightning.gate_analysis.history import MAX_COLUMNS, GateShareHistory
from gatera_lightning.gate_analysis.plots.canvas import COLORMAP, draw_pixels
from gatera_lightning.gate_analysis.plots.gate_shares import draw_gate_shares


def history_of(readings, interval=50, layers=(0, 1, 2)):
    """Reading ``i`` holds nothing but the number ``i``."""
    history = GateShareHistory(list(layers))
    columns = [
        history.add(interval * (i + 1), torch.full((2, 2, len(layers)), float(i))) for i in range(readings)
    ]
    return history, columns


@pytest.mark.parametrize(
    ("readings", "every"),
    [(1, 1), (MAX_COLUMNS, 1), (MAX_COLUMNS + 1, 2), (2 * MAX_COLUMNS, 2), (2 * MAX_COLUMNS + 1, 4), (5000, 32)],
)
def test_a_long_history_keeps_evenly_spaced_readings(readings, every):
    history, columns = history_of(readings)
    kept = list(range(0, readings, every))
    assert len(kept) <= MAX_COLUMNS
    assert history.steps == [50 * (i + 1) for i in kept]
    assert history.shares[:, 1, 0, 2].tolist() == kept
    assert sum(columns) <= MAX_COLUMNS + MAX_COLUMNS / 2 * math.log2(every) + every


def test_a_history_goes_on_from_its_state_and_leaves_it_alone():
    whole, _ = history_of(1000)
    part, _ = history_of(333)
    state = part.state_dict()
    kept = {name: list(value) for name, value in state.items() if name in ("steps", "shares")}
    restored = GateShareHistory.from_state_dict(state)
    for i in range(333, 1000):
        restored.add(50 * (i + 1), torch.full((2, 2, 3), float(i)))
    assert (restored.steps, restored.stride, restored.measurements) == (whole.steps, whole.stride, whole.measurements)
    assert torch.equal(restored.shares, whole.shares)
    assert state["steps"] == kept["steps"]
    assert all(map(torch.equal, state["shares"], kept["shares"]))


def panel(figure, label):
    """The inner pixels of the panel with this label, and where its lower left corner is."""
    (axes,) = (
        axes for axes in figure.axes if [text.get_text().startswith(label) for text in axes.texts] == [True]
    )
    picture = draw_pixels(figure)
    size = np.array(picture.shape[1::-1])
    (left, bottom), (right, top) = axes.get_position().get_points() * size
    inner = picture[int(size[1] - top) + 3 : int(size[1] - bottom) - 3, int(left) + 3 : int(right) - 3]
    return inner, (left, bottom)


def colour(share):
    return np.array(colormaps[COLORMAP](share)[:3]) * 255


def test_closed_is_above_open_and_prompt_left_of_response():
    history, shares = (
        GateShareHistory(list(range(4))),
        torch.tensor([[0.1, 0.35], [0.6, 0.9]]),
    )  # (phases, closed and open)
    for step in (10, 20, 30):
        history.add(step, shares[:, :, None].expand(2, 2, 4))
    figure = draw_gate_shares(history)
    places = {}
    for phase, of_phase in zip(("prompt", "response"), shares.tolist(), strict=True):
        for share, value in zip(("closed", "open"), of_phase, strict=True):
            inner, places[phase, share] = panel(figure, f"{phase}, {share}")
            np.testing.assert_allclose(inner, np.broadcast_to(colour(value), inner.shape), atol=2)
    (left, above), (right, below) = places["prompt", "closed"], places["response", "open"]
    assert left < right
    assert above > below
    assert places["prompt", "open"] == (left, below)


def test_steps_go_right_and_layers_up():
    """The share is 1 in the last layer from the third of three steps on, and nowhere else; no tokens leave white."""
    history = GateShareHistory([3, 7, 12, 40])
    for step in (10, 20, 30):
        shares = torch.zeros(2, 2, 4)
        shares[:, :, 3] = float(step == 30)
        shares[1] = math.nan
        history.add(step, shares)
    figure = draw_gate_shares(history)
    closed, _ = panel(figure, "prompt, closed")
    height, width, _ = closed.shape
    bright = np.abs(closed - colour(1.0)).max(-1) < 3
    assert bright[: height // 4 - 5, 2 * width // 3 + 5 :].all()
    assert not bright[height // 4 + 5 :].any()
    assert not bright[:, : 2 * width // 3 - 5].any()
    assert (panel(figure, "response, open")[0] == 255).all()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["3", "7", "12", "40"]


@pytest.mark.parametrize(("layers", "columns"), [(1, 1), (32, 150), (80, MAX_COLUMNS)])
def test_pictures_are_of_a_size_that_a_page_shows(layers, columns):
    history, _ = history_of(columns, layers=range(layers))
    height, width, channels = draw_pixels(draw_gate_shares(history)).shape
    assert (width, channels) == (900, 3)
    assert 300 <= height <= 920
