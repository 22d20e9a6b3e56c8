"""Storages that this environment has, and layers whose weight is packed by one."""

import pytest
import torch
from adapted_layers import adapted_layer
from torch import nn

from gatera_lightning.adapters.packed_weight import PackedWeight
from gatera_lightning.adapters.storages import STORAGES

ALL_STORAGES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(storage.problem() is not None, reason=str(storage.problem())),
    )
    for name, storage in STORAGES.items()
]


def pack_weight(linear, storage):
    """Pack the weight of a layer in place, and return the layer."""
    linear.weight = nn.Parameter(PackedWeight.pack(linear.weight, storage), requires_grad=False)
    return linear


def packed_adapted_layer(storage, update, gate, size=(64, 48, 3), **settings):
    """Create an adapted layer over a packed weight; the same arguments give the same values."""
    layer = adapted_layer(update, gate, size, **settings)
    pack_weight(layer.base, storage)
    if update == "dora":
        with torch.no_grad():
            layer.update.magnitude.copy_(layer.base.weight.dense(torch.float32).norm(dim=1))
    return layer
