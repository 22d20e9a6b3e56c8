"""A gate of one's own in one file: it reads the update's output, and nothing else in the project changes."""

from dataclasses import dataclass

import pytest
import torch
import yaml
from torch import nn

from gatera_lightning import (
    AdapterConfig,
    Gate,
    GateConfig,
    inject_adapters,
    load_adapter,
    merge_adapter,
    prepared_for_inference,
    record_gates,
    register_gate,
    save_adapter,
)
from gatera_lightning.adapters.gates import GATES, describe_gates
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.cli.main import main

TOKENS = torch.arange(12).reshape(2, 6)


class NormGate(Gate):
    """``z = (‖u(x)‖ / ‖W0 x‖ − τ) / T``: opens for tokens whose update is large; τ is learned, T = 0.1."""

    depends_on_token = True
    needs_update = True

    def __init__(self, threshold, *, dtype, device):
        super().__init__()
        self.threshold = nn.Parameter(torch.full((1,), threshold, dtype=dtype, device=device))

    def forward(self, x, base_out=None, update_out=None):
        ratio = update_out.norm(dim=-1) / base_out.norm(dim=-1)  # (...)
        return (ratio.to(self.threshold.dtype) - self.threshold) / 0.1


@dataclass
class NormGateConfig(GateConfig):
    """Opens for tokens whose update is large."""

    kind = "norm"
    formula = "σ((‖u(x)‖ / ‖W0 x‖ − τ) / 0.1)"

    threshold: float = 0.05
    """Initial τ."""

    def build(self, in_features, *, dtype, device):
        return NormGate(self.threshold, dtype=dtype, device=device)

    def problems(self):
        found = super().problems()
        if self.threshold < 0:
            found.append(f"adapter.gate.threshold: {self.threshold!r}; accepted: a number of at least 0")
        return found


@pytest.fixture(autouse=True)
def registered():
    register_gate(NormGateConfig)
    yield
    del GATES["norm"]


def _adapted(backbone, update="hira", *, threshold=0.05, adapter_dtype="float32"):
    gate = NormGateConfig(threshold=threshold)
    config = AdapterConfig(update=update, gate=gate, rank=4, adapter_dtype=adapter_dtype)
    inject_adapters(backbone, config, torch.Generator().manual_seed(0))
    return backbone


def test_registration_lists_gate():
    assert "norm = σ((‖u(x)‖ / ‖W0 x‖ − τ) / 0.1)" in describe_gates()
    assert AdapterConfig(gate="norm").gate == NormGateConfig()
    assert AdapterConfig.from_dict({"gate": {"kind": "norm", "threshold": 0.2}}).gate.threshold == 0.2
    (problem,) = AdapterConfig(gate=NormGateConfig(threshold=-1.0)).problems()
    assert problem == "adapter.gate.threshold: -1.0; accepted: a number of at least 0"


def test_command_line_accepts_gate(tiny_backbone, capsys):
    flags = ["--model.adapter.gate", "norm", "--model.adapter.gate.threshold", "0.2"]
    backbone = ["--config", "quickstart.yaml", "--model.backbone.id", str(tiny_backbone)]
    with pytest.raises(SystemExit):
        main(["fit", *backbone, *flags, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["adapter"]["gate"]
    assert printed["class_path"].endswith("NormGateConfig")  # by its class: a later run imports it by itself
    assert printed["init_args"] == {"lr_multiplier": 1.0, "threshold": 0.2}
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "norm = σ((‖u(x)‖ / ‖W0 x‖ − τ) / 0.1)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_layer_equals_formula(tiny_llama, randomize, update, bias):
    backbone = tiny_llama(torch.float64, attention_bias=bias)
    model = randomize(_adapted(backbone, update, adapter_dtype="float64"))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u = x @ layer.update.delta_weight(layer.weight).t()
    base_out = x @ layer.weight.t()
    g = torch.sigmoid((u.norm(dim=-1) / base_out.norm(dim=-1) - layer.gate.threshold) / 0.1)
    torch.testing.assert_close(layer(x), layer.base(x) + g.unsqueeze(-1) * u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_training_updates_gate_and_factors(tiny_llama, update):
    model = _adapted(tiny_llama(), update).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        with record_gates(model) as gates:
            loss = model(TOKENS, labels=TOKENS).loss
        assert gates.stacked(torch.ones_like(TOKENS)).shape == (10, 2, 6)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    layer = model.model.layers[1].mlp.down_proj
    assert layer.update.b.abs().max() > 0
    assert layer.gate.threshold.item() != pytest.approx(0.05)


def test_saved_gate_loads(tiny_llama, randomize, tmp_path):
    saved = randomize(_adapted(tiny_llama(), threshold=0.2))
    loaded = tiny_llama()
    config = load_adapter(loaded, save_adapter(saved, tmp_path))
    assert config.gate == NormGateConfig(threshold=0.2)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, saved(TOKENS).logits)


@pytest.mark.parametrize("thresholds", [{}, {"skip_below": 1e-9}], ids=["exact", "thresholds"])
def test_prepared_model_equals_plain_model(tiny_llama, randomize, thresholds):
    model = randomize(_adapted(tiny_llama(attention_bias=True))).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        with prepared_for_inference(model, **thresholds), record_gates(model) as gates:
            found = model(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert gates.names == list(adapted_linears(model))


def test_merge_is_rejected(tiny_llama):
    with pytest.raises(ValueError, match="has a 'norm' gate, whose value differs between tokens"):
        merge_adapter(_adapted(tiny_llama()))
