"""An adapter with random values on the tiny backbone, and runs of the ``gates`` subcommand on it."""

import torch

from gatera_lightning import AdapterConfig, BackboneConfig, adapter_parameters, inject_adapters, save_adapter
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli.main import main

TEXTS = ["Question: what do <script>document.title = 'run'</script> make?", "We ride $5 bikes."]


def save_random_adapter(folder, backbone, gate="token", seed=0, template=None):
    """Save an adapter of rank 2 with random values; returns the adapted model in eval mode."""
    model = load_backbone(BackboneConfig(id=str(backbone), dtype="float32"), "cpu")
    inject_adapters(model, AdapterConfig(gate=gate, rank=2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder, backbone=str(backbone), template=template)
    return model.eval()


def run_gates(folder, *args, out="report.json", texts=TEXTS):
    """Run ``gates`` on the adapter ``folder/tuned``, writing ``folder/out``; returns the exit status."""
    text_args = [arg for text in texts for arg in ("--text", text)]
    adapter, out = str(folder / "tuned"), str(folder / out)
    return main(["gates", "--adapter", adapter, *text_args, "--dtype", "float32", "--out", out, *args])
