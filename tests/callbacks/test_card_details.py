"""What the model card says about a run, read from the objects of the run."""

from types import SimpleNamespace

import torch
from tiny_backbone import tiny_data, tiny_module

from gatera_lightning.callbacks.card_details import run_details


def test_details_name_the_sources_that_were_trained_on(tiny_backbone):
    trainer = SimpleNamespace(
        lightning_module=tiny_module(tiny_backbone),
        datamodule=tiny_data(tiny_backbone, train=["everyday[:8]"], batch_size=3),
        callback_metrics={"val/loss": torch.tensor(1.5), "by_layer": torch.ones(2)},
        global_step=7,
    )
    details = run_details(trainer)
    data = details["Training data"]
    assert (data["task"], data["train"], data["batch_size"]) == ("CommonsenseDataModule", ["everyday[:8]"], 3)
    assert (details["Training"]["optimizer steps"], details["Training"]["lr"]) == (7, 1e-2)
    assert details["Metrics"] == {"val/loss": 1.5}
