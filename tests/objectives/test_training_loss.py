"""training_loss against GateRAModule's step, bit for bit, and against its formula."""

import pytest
import torch
from tiny_backbone import tiny_data, tiny_trainer

from gatera_lightning import (
    AdapterConfig,
    BackboneConfig,
    GateRAModule,
    OptimizerConfig,
    adapter_parameters,
    inject_adapters,
)
from gatera_lightning.adapters.gates import StaticGateConfig, TokenGateConfig
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.objectives import GateEntropy, NextToken, default_objectives, training_loss
from gatera_lightning.objectives.training_loss import objectives_problems
from gatera_lightning.training.optimizer import build_optimizer

ADAPTERS = {
    "token": AdapterConfig(rank=4, gate=TokenGateConfig(bias=0.3, entropy_weight=0.5)),
    "token without entropy": AdapterConfig(rank=4, gate=TokenGateConfig(entropy_weight=0.0)),
    "static": AdapterConfig(rank=4, gate=StaticGateConfig(entropy_weight=0.1)),
    "none": AdapterConfig(rank=4, update="lora", gate="none"),
}


def loaded(backbone, adapter):
    """The adapted model as GateRAModule loads it."""
    model = load_backbone(backbone)
    inject_adapters(model, adapter, torch.Generator().manual_seed(0))
    return model.train()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("gate", ADAPTERS)
def test_plain_loop_equals_module_bit_for_bit(tiny_backbone, tmp_path, monkeypatch, gate, packing, dtype):
    """Four optimizer steps: losses and final parameters."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    backbone, adapter = BackboneConfig(id=str(tiny_backbone), dtype=dtype), ADAPTERS[gate]
    config = OptimizerConfig(lr=1e-2, warmup_steps=1)
    module = GateRAModule(backbone=backbone, adapter=adapter, optimizer=config)
    logged = []
    monkeypatch.setattr(
        GateRAModule,
        "on_train_batch_end",
        lambda self, *_: logged.append(float(self.trainer.callback_metrics["train/loss"])),
    )
    data = tiny_data(tiny_backbone, packing=packing)
    tiny_trainer(tmp_path).fit(module, datamodule=data)

    model = loaded(backbone, adapter)
    optimizer, scheduler = build_optimizer(config, model, total_steps=lambda: 4)
    losses = []
    for batch in list(data.train_dataloader())[:4]:
        loss = training_loss(model, batch)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == logged
    expected = adapter_parameters(module.model)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, expected[name]), name


def test_totals_default_to_those_of_the_batch(tiny_backbone):
    model = loaded(BackboneConfig(id=str(tiny_backbone), dtype="float32"), ADAPTERS["token"])
    data = tiny_data(tiny_backbone)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    given = training_loss(model, batch)
    bare = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    assert torch.equal(training_loss(model, bare), given)
    halves = [{name: value[rows] for name, value in bare.items()} for rows in (slice(4), slice(4, None))]
    totals = {name: batch[name] for name in ("step_supervised_tokens", "step_tokens")}
    assert float(sum(training_loss(model, half | totals) for half in halves)) == pytest.approx(
        float(given), rel=1e-6
    )


def test_missing_tensor_is_named(tiny_backbone):
    model = loaded(BackboneConfig(id=str(tiny_backbone), dtype="float32"), ADAPTERS["token"])
    with pytest.raises(
        ValueError, match=r"^training_loss: the batch has no attention_mask, labels; it has input_ids"
    ):
        training_loss(model, {"input_ids": torch.tensor([[3, 4]])})


def test_model_without_adapter_is_rejected(tiny_llama):
    with pytest.raises(ValueError, match="the model has no adapted layers; call inject_adapters"):
        default_objectives(tiny_llama())


@pytest.mark.parametrize(("gate", "weight"), [("token", 0.5), ("static", 0.1), ("none", 0.0)])
def test_default_objectives_use_weight_of_gate_settings(tiny_llama, gate, weight):
    model = tiny_llama()
    inject_adapters(model, ADAPTERS[gate])
    assert default_objectives(model) == [NextToken(), GateEntropy(weight)]


@pytest.mark.parametrize(
    ("gate", "objectives", "found"),
    [
        ("token", [NextToken()], "there is no GateEntropy"),
        ("token", [NextToken(), GateEntropy(0.3)], "GateEntropy has the weight 0.3"),
        ("static", [GateEntropy(0.0)], "GateEntropy has the weight 0.0"),
        ("token", [NextToken(), GateEntropy(0.5)], None),
        ("token without entropy", [NextToken()], None),
        ("none", [NextToken()], None),
    ],
)
def test_entropy_weight_without_effect_is_a_problem(gate, objectives, found):
    problems = objectives_problems(objectives, ADAPTERS[gate])
    assert [found in problem for problem in problems] == [True] * (found is not None)
