"""Fingerprints of weights and backbones."""

import torch

from gatera_lightning.adapters.fingerprint import backbone_fingerprint, weight_fingerprint


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
    one, other = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    assert (
        backbone_fingerprint(one) == backbone_fingerprint(other) != backbone_fingerprint({"a": "2", "b": "1"})
    )
    assert backbone_fingerprint({"a": "1"}) != backbone_fingerprint({"c": "1"})


def test_weight_without_values_has_no_fingerprint():
    assert weight_fingerprint(torch.empty(3, 4, device="meta")) == ""
