"""Fingerprints of weights and backbones."""

import pytest
import torch

from gatera_lightning.adapters.fingerprint import (
    WeightFingerprint,
    backbone_fingerprint,
    fingerprint_version,
    weight_fingerprint,
)


def test_weight_fingerprint_depends_on_values_and_shape():
    weight = torch.randn(160, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    own = weight_fingerprint(weight)
    assert own == weight_fingerprint(weight.float()) == weight_fingerprint(weight.clone().requires_grad_())
    assert own == weight_fingerprint(weight.t().contiguous().t())
    assert own != weight_fingerprint(weight.reshape(130, 160))
    assert own != weight_fingerprint(weight.t())
    finetuned = weight + 0.01 * torch.randn(160, 130, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert own != weight_fingerprint(finetuned)
    changed = weight.clone()
    changed[0, 0] += 1
    assert own != weight_fingerprint(changed)


def test_backbone_fingerprint_depends_on_names_not_order():
    first, second = WeightFingerprint("1", "2"), WeightFingerprint("3", "4")
    for version in (1, 2):
        found = backbone_fingerprint({"a": first, "b": second}, version)
        assert found == backbone_fingerprint({"b": second, "a": first}, version)
        assert found != backbone_fingerprint({"a": second, "b": first}, version)
        assert found != backbone_fingerprint({"a": first, "c": second}, version)
        assert fingerprint_version(found) == version


@pytest.mark.parametrize(
    ("rows", "width"), [(576, 576), (1536, 576), (4096, 4096), (512, 2048), (3, 20000), (1, 7), (128, 4095)]
)
def test_fingerprint_depends_on_every_column(rows, width):
    weight = torch.zeros(rows, width, dtype=torch.bfloat16)
    own = weight_fingerprint(weight).version_2
    for column in {0, 1, width // 3, width // 2, width - 1}:
        changed = weight.clone()
        changed[:, column] = 1
        assert weight_fingerprint(changed).version_2 != own


def test_weight_without_values_has_no_fingerprint():
    assert weight_fingerprint(torch.empty(3, 4, device="meta")) == WeightFingerprint("", "")
