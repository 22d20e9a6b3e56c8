"""The reference of benchmarks/quantized_backbones.py trains as this library's LoRA does, with PEFT's own."""

from pathlib import Path

import pytest
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.evaluation_report import EvaluationReport

pytest.importorskip("peft", reason="needs the extra peft")


def test_reference_trains_as_own_lora(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks.harness.peft_reference import copy_start, fit_and_evaluate_reference, reference_model
    from benchmarks.quantized_backbones import LossHistory

    module = tiny_module(tiny_backbone, update="lora", gate="none", warmup_steps=2)
    module.configure_model()
    reference = reference_model(str(tiny_backbone), module.adapter, nf4=False, keep_dense=[])
    assert copy_start(module.model, reference) == 0
    data = tiny_data(tiny_backbone)
    losses, nats = fit_and_evaluate_reference(reference, data, steps=4, lr=1e-2, warmup_steps=2)

    history, report = LossHistory(), EvaluationReport()
    trainer = tiny_trainer(tmp_path, history, report, gradient_clip_val=1.0)
    trainer.fit(module, datamodule=data)
    assert losses == pytest.approx(history.losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.01  # far more than the tolerance
    trainer.test(module, datamodule=data, verbose=False)
    assert nats == pytest.approx(report.result.gold_loss, abs=1e-5)
