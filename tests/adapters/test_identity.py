"""Identities of adapters and backbones."""

import torch

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.adapters.identity import adapter_identity, backbone_identity


def _adapted(backbone, seed=0):
    config = AdapterConfig(rank=2, target_modules=["q_proj"])
    inject_adapters(backbone, config, torch.Generator().manual_seed(seed))
    return backbone


def test_adapter_identity_depends_on_parameter_values(tiny_llama):
    model, same, other = _adapted(tiny_llama()), _adapted(tiny_llama()), _adapted(tiny_llama(), seed=1)
    assert adapter_identity(model) == adapter_identity(same) != adapter_identity(other)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.gate.bias.add_(1e-6)
    assert adapter_identity(model) != adapter_identity(same)


def test_adapter_identity_in_inference_mode(tiny_llama):
    model = _adapted(tiny_llama())
    with torch.inference_mode():
        inside = adapter_identity(model)
    assert inside == adapter_identity(model)


def test_backbone_identity_depends_on_adapted_weights(tiny_llama):
    model, other = _adapted(tiny_llama()), _adapted(tiny_llama(seed=1))
    assert backbone_identity(model) == backbone_identity(_adapted(tiny_llama(), seed=1))
    assert backbone_identity(model) != backbone_identity(other)
