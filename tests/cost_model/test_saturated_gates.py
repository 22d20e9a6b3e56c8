"""What saturated gates save, against counted matmuls of real steps."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning import AdapterConfig, HardGateConfig, inject_adapters
from gatera_lightning.cost_model.saturated_gates import half_open, saved_flops


def counted(model, ids):
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("dtype", "rounding", "recomputed"),
    [
        (torch.float32, False, False),
        (torch.float32, False, True),
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, False),
    ],
)
def test_savings_equal_counted_matmuls(tiny_llama, monkeypatch, dtype, rounding, recomputed):
    """A step with hard gates that are open for every second token, and one with soft gates."""
    monkeypatch.setattr(torch, "rand_like", lambda g: (torch.arange(g.numel()) % 2).view_as(g) * 0.8 + 0.1)
    ids = torch.arange(32).reshape(2, 16)
    models = {}
    for name, gate in (("soft", "token"), ("hard", HardGateConfig(bias=0.0, gradient_share=1 / 8))):
        model = tiny_llama(dtype).train()
        rounds = rounding and name == "hard"
        inject_adapters(model, AdapterConfig(rank=4, gate=gate, stochastic_rounding=rounds))
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        models[name] = model
    found = counted(models["soft"], ids) - counted(models["hard"], ids)
    shares = half_open(models["hard"])
    assert found == saved_flops(models["hard"], ids.numel(), shares, recomputed=recomputed) > 0


@pytest.mark.parametrize("settings", [{}, {"update": "lora", "gate": "hard"}, {"gate": "threshold"}], ids=str)
def test_methods_without_separate_tokens_save_nothing(tiny_llama, settings):
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(rank=4, **settings))
    assert half_open(model) is None
