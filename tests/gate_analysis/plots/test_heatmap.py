"""Heatmaps: a row a layer, the mean of its modules; labels that are text, whatever they hold."""

import numpy as np

from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.plots.canvas import draw_pixels
from gatera_lightning.gate_analysis.plots.heatmap import draw_heatmap
from gatera_lightning.gate_analysis.statistics import mean_by_layer

MODULES = [
    GatedModule(f"model.layers.{layer}.mlp.{name}") for layer in (10, 2) for name in ("up_proj", "down_proj")
]
GATES = np.array([[0.0, 1.0], [0.5, 0.5], [0.2, 0.2], [0.4, 0.0]])


def test_the_mean_of_the_modules_of_each_layer():
    layers, means = mean_by_layer(MODULES, GATES)
    assert layers == [2, 10]
    np.testing.assert_allclose(means, [[0.3, 0.1], [0.25, 0.75]])


def test_a_picture_with_labels_as_they_are():
    figure = draw_heatmap(MODULES, GATES, ["$x", "a_{"], 1, "title")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$x", "a_{"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "10"]
    np.testing.assert_allclose(axes.images[0].get_array(), mean_by_layer(MODULES, GATES)[1])
    assert len(np.unique(draw_pixels(figure).reshape(-1, 3), axis=0)) > 20
