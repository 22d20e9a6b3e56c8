"""Validation metrics over whole splits."""

import math

import pytest
import torch
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning.training.evaluation_steps import ValidationMetrics


def test_nan_in_validation_loss_is_not_dropped():
    metrics = ValidationMetrics()
    metrics.loss.update(torch.tensor(torch.nan), weight=5)
    metrics.loss.update(torch.tensor(2.0), weight=3)
    assert not math.isfinite(float(metrics.loss.compute()))


@pytest.mark.parametrize("rank_validation", [False, True])
def test_names_of_logged_metrics(tiny_backbone, tmp_path, rank_validation):
    data = tiny_data(tiny_backbone, rank_validation=rank_validation)
    trainer = tiny_trainer(tmp_path, limit_val_batches=1.0)
    (found,) = trainer.validate(tiny_module(tiny_backbone), datamodule=data, verbose=False)
    accuracies = {f"val/accuracy_{score}" for score in ("sum", "per_token", "per_character")}
    assert set(found) - {"step", "epoch"} == {"val/loss"} | (accuracies if rank_validation else set())


def test_fit_after_validate_starts_from_zero(tiny_backbone, tmp_path):
    module, data = tiny_module(tiny_backbone), tiny_data(tiny_backbone)
    tiny_trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    trainer = tiny_trainer(tmp_path, max_steps=1, limit_val_batches=1.0, val_check_interval=1)
    trainer.fit(module, datamodule=data)
    fitted = trainer.callback_metrics["val/loss"]
    (again,) = tiny_trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert again["val/loss"] == pytest.approx(float(fitted))
