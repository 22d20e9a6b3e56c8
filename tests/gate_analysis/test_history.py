"""Tests of the history of gate shares: which measurements a long history keeps, and its state."""

import math

import pytest
import torch

from gatera_lightning.gate_analysis.history import MAX_COLUMNS, GateShareHistory


def history_of(measurements, interval=50, num_layers=3):
    """A history whose measurement ``i`` is the number ``i``, and which measurements became columns."""
    history = GateShareHistory(list(range(num_layers)))
    columns = [
        history.add(interval * (i + 1), torch.full((2, 2, num_layers), float(i))) for i in range(measurements)
    ]
    return history, columns


@pytest.mark.parametrize(
    ("measurements", "stride"),
    [
        (1, 1),
        (MAX_COLUMNS, 1),
        (MAX_COLUMNS + 1, 2),
        (2 * MAX_COLUMNS, 2),
        (2 * MAX_COLUMNS + 1, 4),
        (5000, 32),
    ],
)
def test_history_keeps_evenly_spaced_measurements(measurements, stride):
    history, columns = history_of(measurements)
    expected = list(range(0, measurements, stride))
    assert len(expected) <= MAX_COLUMNS
    assert history.steps == [50 * (i + 1) for i in expected]
    assert history.shares[:, 1, 0, 2].tolist() == expected
    assert sum(columns) <= MAX_COLUMNS + MAX_COLUMNS / 2 * math.log2(stride) + stride


def test_history_resumes_from_state_without_changing_it():
    complete, _ = history_of(1000)
    partial, _ = history_of(333)
    state = partial.state_dict()
    copies = {name: list(value) for name, value in state.items() if name in ("steps", "shares")}
    restored = GateShareHistory.from_state_dict(state)
    for i in range(333, 1000):
        restored.add(50 * (i + 1), torch.full((2, 2, 3), float(i)))
    assert (restored.steps, restored.stride) == (complete.steps, complete.stride)
    assert restored.measurements == complete.measurements
    assert torch.equal(restored.shares, complete.shares)
    assert state["steps"] == copies["steps"]
    assert all(map(torch.equal, state["shares"], copies["shares"]))


def test_history_state_has_names_of_earlier_checkpoints():
    history, _ = history_of(2)
    assert set(history.state_dict()) == {"layers", "steps", "shares", "every", "readings"}
