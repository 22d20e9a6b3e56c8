"""Tests of layer × token heatmaps."""

import numpy as np

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
