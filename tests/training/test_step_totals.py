"""The terms of a step, summed over micro-batches and ranks."""

import pytest
import torch

from gatera_lightning.adapters.gate_recording import GateRecord
from gatera_lightning.objectives.base import MicroBatchLoss
from gatera_lightning.training.step_totals import StepTotals


def micro_batch(**values):
    weights = {"one": 1.0, "two": 0.5}
    values = {name: torch.tensor(value) for name, value in values.items()}
    return MicroBatchLoss(torch.tensor(0.0), values, {name: weights[name] for name in values}, GateRecord())


def test_values_add_up_over_micro_batches_and_ranks():
    totals = StepTotals()
    for _ in range(2):
        totals.add(micro_batch(one=1.0, two=4.0))
        totals.add(micro_batch(one=2.0, two=6.0))
        loss, values, squares = totals.reduce(torch.tensor([3.0, 5.0]), lambda sums: 2 * sums)
        assert {name: float(value) for name, value in values.items()} == {"one": 6.0, "two": 20.0}
        assert float(loss) == 6 + 0.5 * 20
        assert squares.tolist() == [6.0, 10.0]
        totals.clear()


def test_other_terms_than_before_are_rejected():
    totals = StepTotals()
    totals.add(micro_batch(one=1.0, two=4.0))
    totals.clear()
    with pytest.raises(
        RuntimeError, match=r"returned the terms \['one'\], and \['one', 'two'\] for an earlier"
    ):
        totals.add(micro_batch(one=1.0))
