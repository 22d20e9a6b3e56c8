"""A user's own objective, in this file alone: it keeps the model close to the frozen backbone."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from tiny_backbone import tiny_data, tiny_trainer

from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig, adapter_parameters
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.objectives import (
    GateEntropy,
    NextToken,
    Objective,
    Term,
    evaluate_objectives,
    training_loss,
)


class StayClose(Objective):
    """KL divergence from the backbone's predictions to the adapted model's, over non-padding tokens."""

    def __init__(self, backbone, weight=1.0):
        self.backbone = backbone
        self.weight = weight

    def terms(self, model, batch, gates):
        mask = batch["attention_mask"]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
        with torch.no_grad():
            expected = self.backbone(**inputs).logits.log_softmax(-1)  # (batch, tokens, vocabulary)
        found = model(**inputs).logits.log_softmax(-1)
        divergence = F.kl_div(found, expected, log_target=True, reduction="none").sum(-1)  # (batch, tokens)
        return {"kl": Term((divergence * mask).sum(), batch["step_tokens"], self.weight)}


@pytest.fixture
def backbone(tiny_backbone):
    return BackboneConfig(id=str(tiny_backbone), dtype="float32")


class Logged(L.Callback):
    """The values of every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(backbone, root, weight, **trainer):
    objectives = [NextToken(), GateEntropy(0.01), StayClose(load_backbone(backbone), weight)]
    module = GateRAModule(
        backbone=backbone,
        adapter=AdapterConfig(update="lora", rank=4),
        optimizer=OptimizerConfig(lr=0.1, warmup_steps=0),
        objectives=objectives,
    )
    logged = Logged()
    tiny_trainer(root, logged, **trainer).fit(module, datamodule=tiny_data(backbone.id))
    return module, logged.steps


def test_module_trains_and_logs_own_objective(backbone, tmp_path):
    _, free = fit(backbone, tmp_path, weight=0.0)
    module, bound = fit(backbone, tmp_path, weight=10.0)
    assert free[0]["train/kl"] == pytest.approx(0, abs=1e-6)  # an adapter starts as the identity
    assert bound[-1]["train/kl"] < 0.5 * free[-1]["train/kl"]
    for step in bound:
        terms = step["train/task_loss"] + 0.01 * step["train/gate_entropy"] + 10 * step["train/kl"]
        assert step["train/loss"] == pytest.approx(terms, rel=1e-5)
    assert "objectives" not in module.hparams


def test_loss_does_not_depend_on_number_of_micro_batches(backbone, tmp_path):
    (_, once), (_, twice) = (fit(backbone, tmp_path, 1.0, accumulate_grad_batches=n) for n in (1, 2))
    assert [step["train/kl"] for step in once] == pytest.approx(
        [step["train/kl"] for step in twice], rel=1e-3
    )


def test_training_loss_takes_own_objective(backbone, tiny_backbone, tmp_path):
    module, _ = fit(backbone, tmp_path, weight=1.0)
    data = tiny_data(tiny_backbone)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    loss = training_loss(module.model, batch, objectives=module.objectives)
    assert torch.equal(loss, evaluate_objectives(module.objectives, module.model, batch).loss)
    gradients = torch.autograd.grad(loss, list(adapter_parameters(module.model).values()))
    assert all(math.isfinite(float(gradient.norm())) for gradient in gradients)
