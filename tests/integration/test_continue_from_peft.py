"""A run starts from a LoRA folder of PEFT, with or without gates, and `generate` reads such a folder."""

import json

import peft
import pytest
import torch
from tiny_backbone import NO_PICTURES, tiny_args
from transformers import AutoModelForCausalLM

from gatera_lightning.adapters.serialization import read_adapter
from gatera_lightning.cli.main import main

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def theirs(tiny_backbone, tmp_path):
    """A LoRA of PEFT, rank 4, alpha 8, with random values."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_backbone), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("gate", ["none", "token"])
def test_run_starts_from_a_lora_of_peft(tiny_backbone, theirs, tmp_path, monkeypatch, gate):
    monkeypatch.chdir(tmp_path)
    flags = [
        *(*tiny_args(tiny_backbone), *NO_PICTURES, "--model.warm_start", str(theirs)),
        *("--model.adapter.update", "lora", "--model.adapter.alpha", "8", "--model.adapter.gate", gate),
        *("--model.adapter.target_modules", json.dumps(TARGETS), "--model.optimizer.lr", "1e-9"),
        *(("--model.adapter.gate.bias", "4.0") if gate == "token" else ()),
    ]
    assert main(["fit", "--config", "quickstart.yaml", *flags]) == 0
    _, before = read_adapter(theirs)
    stored, after = read_adapter("runs/quickstart/version_0/checkpoints/last")
    assert stored.config.gate.kind == gate
    for name, tensor in before.items():
        assert torch.allclose(after[name], tensor, atol=1e-6)
    biases = [float(tensor) for name, tensor in after.items() if name.endswith("gate.bias")]
    assert all(bias == pytest.approx(4.0, abs=1e-4) for bias in biases)
    assert bool(biases) == (gate == "token")


def test_generate_answers_with_a_lora_of_peft(theirs, capsys):
    flags = ["--adapter", str(theirs), "--max_new_tokens", "3", "--template", "plain"]
    assert main(["generate", *flags, "--prompt", "Why?"]) == 0
    assert capsys.readouterr().out


def test_other_rank_is_named(tiny_backbone, theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*tiny_args(tiny_backbone), "--model.warm_start", str(theirs), "--model.adapter.update", "lora"]
    assert main(["fit", "--config", "quickstart.yaml", *flags, "--model.adapter.rank", "3"]) == 2
    assert "has rank 4, but model.adapter.rank is 3" in capsys.readouterr().err
