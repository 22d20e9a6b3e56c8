"""Rankings of modules by the share of tokens that they skip."""

import numpy as np
import pytest

from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.module_ranking import rank_modules
from gatera_lightning.gate_analysis.probing import GateProfile, ProbeText


@pytest.fixture
def profile():
    """Two layers of two projection types on texts of three and one tokens."""
    paths = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("q_proj", "up_proj")]
    gates = np.array([[0.05, 0.2, 0.5, 0.9], [0.6, 0.7, 0.8, 0.9], [0.05] * 4, [0.5, 0.6, 0.7, 0.8]])
    texts = [ProbeText("a", [1, 2, 3], 2), ProbeText("b", [4], 1)]
    return GateProfile([GatedModule(path) for path in paths], texts, [gates[:, :3], gates[:, 3:]])


def test_gates_that_decide_skip_at_one_half(profile):
    ranking = rank_modules(profile, decides=True)
    assert [(m.name, m.skipped) for m in ranking.modules] == [
        ("model.layers.0.up_proj", 0.0),
        ("model.layers.1.up_proj", 0.25),
        ("model.layers.0.q_proj", 0.75),
        ("model.layers.1.q_proj", 1.0),
    ]
    assert [(p.name, p.skipped) for p in ranking.projections] == [("up_proj", 0.125), ("q_proj", 0.875)]
    assert ranking.projections[0].mean == pytest.approx((3.0 + 2.6) / 8)
    assert (ranking.tokens, ranking.suggested_targets) == (4, ["up_proj"])


def test_other_gates_skip_below_a_tenth(profile):
    ranking = rank_modules(profile, decides=False)
    shares = {m.name: m.skipped for m in ranking.modules}
    assert (shares["model.layers.0.q_proj"], shares["model.layers.1.up_proj"]) == (0.25, 0.0)
    assert ranking.rule == "g < 0.1"


def test_equal_modules_are_all_suggested(profile):
    equal = GateProfile(profile.modules, profile.texts, [np.full((4, 3), 0.3), np.full((4, 1), 0.3)])
    assert set(rank_modules(equal, decides=True).suggested_targets) == {"q_proj", "up_proj"}
