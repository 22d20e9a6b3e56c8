"""An update of one's own in one file: nothing else in the project changes."""

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from gatera_lightning import (
    AdapterConfig,
    Update,
    inject_adapters,
    load_adapter,
    merge_adapter,
    prepared_for_inference,
    register_update,
    save_adapter,
)
from gatera_lightning.adapters.updates import UPDATES, describe_updates
from gatera_lightning.cli.main import main

TOKENS = torch.arange(12).reshape(2, 6)
GATES = ["none", "static", "token"]


class ScaledLoRA(Update):
    """``u(x) = m ⊙ (α/r) · B (A x)``: LoRA with a learned scale m (out,) for every output, 1 at the start."""

    name = "scaled_lora"
    formula = "m ⊙ (alpha/rank)·B A x"

    def __init__(self, base, *, rank, scale, dtype, generator=None):
        super().__init__(base, rank=rank, scale=scale, dtype=dtype, generator=generator)
        self.output_scale = nn.Parameter(
            torch.ones(base.out_features, dtype=dtype, device=base.weight.device)
        )

    def delta(self, x, base):
        low_rank = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return low_rank * (self.output_scale * self.scale).to(x.dtype)

    @torch.no_grad()
    def delta_weight(self, weight):
        return self.output_scale.unsqueeze(1) * self.scale * (self.b @ self.a)


@pytest.fixture(autouse=True)
def registered():
    register_update(ScaledLoRA)
    yield
    del UPDATES["scaled_lora"]


def _adapted(backbone, gate="token", **settings):
    config = AdapterConfig(update="scaled_lora", gate=gate, rank=4, alpha=8.0, **settings)
    inject_adapters(backbone, config, torch.Generator().manual_seed(0))
    return backbone


def test_registration_lists_update():
    assert "scaled_lora = m ⊙ (alpha/rank)·B A x" in describe_updates()
    assert AdapterConfig(update="scaled_lora", alpha=8.0).problems() == []
    (problem,) = AdapterConfig(update="scaled_loar").problems()
    assert "accepted: lora, dora, hira, abba, block_hira, scaled_lora; did you mean 'scaled_lora'?" in problem


def test_command_line_accepts_update(tiny_backbone, capsys):
    flags = ["--model.adapter.update", "scaled_lora", "--model.adapter.alpha", "8"]
    backbone = ["--config", "quickstart.yaml", "--model.backbone.id", str(tiny_backbone)]
    with pytest.raises(SystemExit):
        main(["fit", *backbone, *flags, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["adapter"]["update"] == "scaled_lora"
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "scaled_lora = m ⊙ (alpha/rank)·B A x" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_fresh_adapted_model_equals_backbone(tiny_llama, gate, dtype):
    model = tiny_llama(dtype)
    expected = model(TOKENS).logits
    assert torch.equal(_adapted(model, gate)(TOKENS).logits, expected)


@pytest.mark.parametrize("gate", GATES)
def test_training_updates_all_parameters(tiny_llama, gate):
    model = _adapted(tiny_llama(), gate, dropout=0.1).train()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not [name for name, p in trainable.items() if torch.equal(p, before[name])]


@pytest.mark.parametrize("gate", GATES)
def test_saved_update_loads(tiny_llama, randomize, tmp_path, gate):
    saved = randomize(_adapted(tiny_llama(), gate))
    loaded = tiny_llama()
    assert load_adapter(loaded, save_adapter(saved, tmp_path)).update == "scaled_lora"
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, saved(TOKENS).logits)


@pytest.mark.parametrize("gate", GATES)
def test_prepared_model_equals_plain_model(tiny_llama, randomize, gate):
    model = randomize(_adapted(tiny_llama(), gate)).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        with prepared_for_inference(model):
            assert torch.equal(model(TOKENS).logits, expected)
        with prepared_for_inference(model, skip_below=1e-9):
            torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["none", "static"])
def test_merged_model_equals_adapted_model(tiny_llama, randomize, gate):
    model = randomize(_adapted(tiny_llama(), gate)).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        torch.testing.assert_close(merge_adapter(model)(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
