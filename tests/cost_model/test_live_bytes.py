"""Bytes of live tensors against sums by hand."""

import pytest
import torch

from gatera_lightning.cost_model.live_bytes import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_are_counted_while_they_live(device):
    known = torch.zeros(1000, device=device)
    with LiveBytes([known]) as live:
        one = torch.zeros(100, device=device)
        view = one[:10]
        assert live.now == live.peak == live.recent_peak == 400
        two = one + 1
        del one
        assert (live.now, live.peak) == (800, 800)  # the view refers to the first storage
        del view
        assert (live.now, live.peak) == (400, 800)
        live.reset_recent_peak()
        assert live.recent_peak == 400
        three = two + 1
        assert (live.now, live.peak, live.recent_peak) == (800, 800, 800)
        known.add_(1)
        assert live.now == 800
    del two, three
    assert live.now == 0
