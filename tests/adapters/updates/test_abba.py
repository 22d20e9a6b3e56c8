"""ABBA: its start at the leading singular vectors, and its Khatri–Rao form."""

import pytest
import torch
from adapted_layers import adapted_layer

from gatera_lightning.adapters.updates import abba
from gatera_lightning.adapters.updates.abba import leading_factors


def weight_of_rank(rank, shape=(40, 30)):
    generator = torch.Generator().manual_seed(0)
    factors = (
        torch.randn(shape[0], rank, generator=generator),
        torch.randn(rank, shape[1], generator=generator),
    )
    return (factors[0] @ factors[1]).double()


@pytest.mark.parametrize("exact_side", [1024, 8], ids=["exact", "iterated"])
def test_start_is_best_approximation(monkeypatch, exact_side):
    monkeypatch.setattr(abba, "EXACT_SIDE", exact_side)
    weight = weight_of_rank(12)
    a, b = leading_factors(weight, 3, torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(b @ a, u[:, :3] * s[:3] @ vh[:3], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # both carry the root of the singular values
    assert a.is_contiguous()  # as sending it to other ranks requires
    assert b.is_contiguous()


def test_start_on_meta_device_has_shapes_only():
    a, b = leading_factors(torch.empty(40, 30, device="meta"), 3)
    assert (a.shape, b.shape, a.device.type) == ((3, 30), (40, 3), "meta")


def test_merged_weight_is_hadamard_product(randomize):
    update = randomize(
        adapted_layer("abba", "none", (12, 10, 4), dtype=torch.float64, adapter_dtype="float64")
    ).update
    expected = update.scale * (update.weight_b @ update.weight_a) * (update.b @ update.a)
    torch.testing.assert_close(update.delta_weight(torch.zeros(10, 12)), expected, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(expected) == 4  # two products of rank 2
