"""Ungated methods equal PEFT's in float32 without dropout: logits, gradients and merged weights."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F

from gatera_lightning import AdapterConfig, inject_adapters, merge_adapter
from gatera_lightning.adapters.lookup import adapted_linears

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 6.0
SIMILAR = {"rtol": 1e-4, "atol": 1e-5}


def _peft_config(update):
    if update == "hira":
        return peft.HiraConfig(r=RANK, target_modules=TARGETS)
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=update == "dora", target_modules=TARGETS)


def _peft_params(layer):
    """Return PEFT's parameters of one layer under our names."""
    if hasattr(layer, "hira_A"):
        return {"update.a": layer.hira_A["default"], "update.b": layer.hira_B["default"]}
    found = {"update.a": layer.lora_A["default"].weight, "update.b": layer.lora_B["default"].weight}
    if layer.lora_magnitude_vector:
        found["update.magnitude"] = layer.lora_magnitude_vector["default"].weight
    return found


def _pair(tiny_llama, randomize, update):
    """Return our adapted Llama, PEFT's with equal random parameters, and pairs of their parameters."""
    backbone = tiny_llama(initializer_range=0.2, attention_bias=True)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs = peft.get_peft_model(copy.deepcopy(backbone), _peft_config(update)).eval()
    config = AdapterConfig(
        update=update,
        gate="none",
        rank=RANK,
        alpha=None if update == "hira" else ALPHA,
        target_modules=TARGETS,
    )
    inject_adapters(backbone, config)
    ours = randomize(backbone, size=0.2).eval()
    pairs = []
    for name, layer in adapted_linears(ours).items():
        params = _peft_params(theirs.get_submodule(f"base_model.model.{name}"))
        assert set(params) == set(layer.adapter_params())
        pairs += [(f"{name}.{key}", p, params[key]) for key, p in layer.adapter_params().items()]
    with torch.no_grad():
        for _, own, other in pairs:
            other.copy_(own)
    assert len(adapted_linears(ours)) == 2 * len(TARGETS)
    return ours, theirs, pairs


def _tokens():
    return torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(4))


def _loss(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_logits_and_gradients_equal_peft(tiny_llama, randomize, update):
    ours, theirs, pairs = _pair(tiny_llama, randomize, update)
    tokens = _tokens()
    our_logits, their_logits = ours(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(our_logits, their_logits, **SIMILAR)
    _loss(our_logits, tokens).backward()
    _loss(their_logits, tokens).backward()
    for name, own, other in pairs:
        assert own.grad.abs().max() > 1e-4, name
        error = (own.grad - other.grad).abs().max() / other.grad.abs().max()
        assert error < 1e-4, f"{name}: gradients differ by {error:.1e} of the largest"
    trainable = {id(p) for p in ours.parameters() if p.requires_grad}
    assert trainable == {id(own) for _, own, _ in pairs}
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == sum(
        p.numel() for _, p, _ in pairs
    )


@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_merged_model_equals_peft_and_unmerged_model(tiny_llama, randomize, update):
    ours, theirs, _ = _pair(tiny_llama, randomize, update)
    tokens = _tokens()
    with torch.no_grad():
        unmerged = ours(tokens).logits
        merged, their_merged = merge_adapter(ours), theirs.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, unmerged, **SIMILAR)
        torch.testing.assert_close(merged(tokens).logits, their_merged(tokens).logits, **SIMILAR)
    for (name, own), (their_name, other) in zip(
        merged.named_parameters(), their_merged.named_parameters(), strict=True
    ):
        assert name == their_name
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6, check_dtype=True)
