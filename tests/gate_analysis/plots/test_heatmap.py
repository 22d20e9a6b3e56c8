"""Tests of layer × token heatmaps."""

import warnings

import numpy as np
import pytest

from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.plots.canvas import draw_pixels
from gatera_lightning.gate_analysis.plots.heatmap import draw_heatmap


def test_heatmap_shows_means_and_labels_verbatim():
    modules = [
        GatedModule(f"model.layers.{layer}.mlp.{name}")
        for layer in (10, 2)
        for name in ("up_proj", "down_proj")
    ]
    gates = np.array([[0.0, 1.0], [0.5, 0.5], [0.2, 0.2], [0.4, 0.0]])
    figure = draw_heatmap(modules, gates, ["$x", "a_{"], 1, "title")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$x", "a_{"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "10"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.3, 0.1], [0.25, 0.75]])
    assert len(np.unique(draw_pixels(figure).reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize("text", ["$x", "$\\frac{", "$a$ and $", "你好", "\u0e17\u0e35", "가", "^_{}\\", "%"])
def test_heatmap_draws_any_text(text):
    """Nothing is read as mathematics, and nothing is missing from the font."""
    gates, modules = np.array([[0.0, 1.0]]), [GatedModule("model.layers.0.mlp.up_proj")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_heatmap(modules, gates, [text, "b"], 1, text)
        draw_pixels(figure)
    shown = figure.axes[0].get_xticklabels()[0].get_text()
    assert shown == figure.axes[0].get_title(loc="left")
    assert shown == (text if text.isascii() else "".join(f"\\u{ord(c):04x}" for c in text))


def test_heatmap_of_a_long_text_fits_into_a_picture():
    gates, modules = np.zeros((1, 5_000)), [GatedModule("model.layers.0.mlp.up_proj")]
    figure = draw_heatmap(modules, gates, ["a"] * 5_000, 1, "title")
    assert figure.get_figwidth() * figure.dpi < 2**16
    assert 2_000 < len(figure.axes[0].get_xticks()) < 2_900
