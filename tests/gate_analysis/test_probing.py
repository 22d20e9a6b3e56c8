"""Gate profiles: gates that are no numbers are named."""

import numpy as np
import pytest

from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.probing import GateProfile, ProbeText


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (None, ""),
        ((0, 1, 0), "the gates of model.layers.1.mlp.up_proj are NaN on the text 'a'"),
        ((1, 0, 2), "the gates of model.layers.0.mlp.up_proj are NaN on the text 'b'"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gates_that_are_no_numbers_are_named(bad, problem, value):
    """``bad`` is a text, a module and a token."""
    gates = [np.full((2, 3), 0.5), np.full((2, 3), 0.5)]
    if bad:
        gates[bad[0]][bad[1], bad[2]] = value
    modules = [GatedModule(f"model.layers.{layer}.mlp.up_proj") for layer in range(2)]
    texts = [ProbeText(title, [1, 2, 3], 2) for title in "ab"]
    found = GateProfile(modules, texts, gates).non_finite_problem()
    assert found.removesuffix("; their inputs are not finite") == problem
