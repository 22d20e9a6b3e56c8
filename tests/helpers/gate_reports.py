"""An adapter on the tiny backbone, and the ``gates`` subcommand run on it."""

import torch

from gatera_lightning import AdapterConfig, BackboneConfig, adapter_parameters, inject_adapters, save_adapter
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli.main import main

TEXTS = ["Question: what do <script>document.title = 'run'</script> make?", "We ride $5 bikes."]


def adapter(folder, backbone, gate="token", seed=0):
    model = load_backbone(BackboneConfig(id=str(backbone), dtype="float32"), "cpu")
    inject_adapters(model, AdapterConfig(gate=gate, rank=2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder, backbone=str(backbone))
    return model.eval()


def asked(tmp_path, *args, out="report.json", texts=TEXTS):
    given = [arg for text in texts for arg in ("--text", text)]
    return main(
        [
            "gates",
            "--adapter",
            str(tmp_path / "tuned"),
            *given,
            "--dtype",
            "float32",
            "--out",
            str(tmp_path / out),
            *args,
        ]
    )
