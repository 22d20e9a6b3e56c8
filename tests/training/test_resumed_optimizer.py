"""The optimizer and the schedule of a checkpoint must be those of the settings."""

import copy
import re

import pytest
import torch
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning import (
    ConfigError,
    GateRAModule,
    OptimizerConfig,
    TokenGateConfig,
    adapter_parameters,
)
from gatera_lightning.errors import CheckpointError
from gatera_lightning.training.optimizer import build_optimizer, parameter_groups
from gatera_lightning.training.resumed_optimizer import optimizer_differences

GROUPS, SCHEDULERS = "optimizer_states[0].param_groups", "lr_schedulers[0]"


def module_of(folder, schedule="linear", warmup_steps=1):
    module = tiny_module(folder, gate=TokenGateConfig(lr_multiplier=3.0))
    settings = {"lr": 1e-2, "weight_decay": 0.1, "schedule": schedule, "warmup_steps": warmup_steps}
    return GateRAModule(
        backbone=module.backbone, adapter=module.adapter, optimizer=OptimizerConfig(**settings)
    )


@pytest.fixture(scope="module")
def saved(tiny_backbone, tmp_path_factory):
    """A checkpoint after two of four steps, the first of which warms up."""
    root = tmp_path_factory.mktemp("run")
    trainer = tiny_trainer(root, max_steps=2)
    trainer.fit(module_of(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    trainer.save_checkpoint(root / "two.ckpt")
    return torch.load(root / "two.ckpt", weights_only=True)


CHANGES = [
    (f"{GROUPS}[0].initial_lr", 0.5, "model.optimizer.lr: 0.01"),
    (f"{GROUPS}[1].initial_lr", 0.01, "model.adapter.gate.lr_multiplier: 0.03"),
    (f"{GROUPS}[0].lr", 0.5, "model.optimizer.lr: '0 to 0.01'"),
    (f"{GROUPS}[0].lr", -0.001, "model.optimizer.lr: '0 to 0.01'"),
    (f"{GROUPS}[0].lr", float("nan"), "model.optimizer.lr: '0 to 0.01'"),
    (f"{GROUPS}[0].weight_decay", 0.0, "model.optimizer.weight_decay: 0.1"),
    (f"{GROUPS}[1].weight_decay", "text", "model.optimizer.weight_decay: 0.1"),
    (f"{GROUPS}[0].betas", [0.5, 0.999], "betas of AdamW: [0.9, 0.999]"),
    (f"{GROUPS}[0].eps", 1.0, "eps of AdamW: 1e-08"),
    (f"{GROUPS}[0].amsgrad", True, "amsgrad of AdamW: false"),
    (f"{GROUPS}[0].maximize", True, "maximize of AdamW: false"),
    (f"{GROUPS}[0].name", "other", "model.optimizer: 'update or gate'"),
    (f"{SCHEDULERS}.base_lrs[1]", 0.01, "model.adapter.gate.lr_multiplier: 0.03"),
    ("optimizer_states[0].state", {}, "model.optimizer: 'moments of 2 steps'"),
    (f"{SCHEDULERS}.last_epoch", 90, "model.optimizer.schedule: 2"),
]


@pytest.mark.parametrize(
    ("place", "value", "message"), CHANGES, ids=[f"{place} {value}" for place, value, _ in CHANGES]
)
def test_changed_state_is_refused_by_name(tiny_backbone, tmp_path, saved, place, value, message):
    checkpoint = copy.deepcopy(saved)
    assert not list(optimizer_differences(checkpoint, module_of(tiny_backbone)))
    keys = [int(key) if key.isdigit() else key for key in re.findall(r"\w+", place)]
    owner = checkpoint
    for key in keys[:-1]:
        owner = owner[key]
    owner[keys[-1]] = value
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(ConfigError) as caught:
        tiny_trainer(tmp_path).fit(
            module_of(tiny_backbone), datamodule=tiny_data(tiny_backbone), ckpt_path=tmp_path / "changed.ckpt"
        )
    problem = caught.value.problems[0]
    assert problem.startswith(f"{message}, but the checkpoint's optimizer has ")
    assert f"({place}); accepted: a checkpoint with " in problem


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("warmup_steps", [0, 2, 9])
def test_own_state_is_accepted_at_every_step(schedule, steps, warmup_steps):
    """Of an optimizer that steps as a run does."""

    class Module:
        configure_optimizers = GateRAModule.configure_optimizers

    module = Module()
    module.optimizer = OptimizerConfig(lr=3e-3, schedule=schedule, warmup_steps=warmup_steps)
    module.adapter = type("Adapter", (), {"gate": TokenGateConfig(lr_multiplier=7.0)})
    checkpoint = states(module.optimizer, steps)
    assert not list(optimizer_differences(checkpoint, module))
    if schedule == "constant" or steps <= warmup_steps:
        checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] *= 0.9
        ((setting, *_),) = optimizer_differences(checkpoint, module)
        assert setting == "model.optimizer.lr"


def states(config, steps):
    from torch.optim.lr_scheduler import LambdaLR

    from gatera_lightning.training.optimizer import lr_factor

    groups = [
        {"params": [torch.zeros(1)], "lr": config.lr * factor, "name": name}
        for name, factor in (("update", 1), ("gate", 7.0))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    scheduler = LambdaLR(optimizer, lr_factor(config.schedule, config.warmup_steps, lambda: 4))
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(1)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return {
        "global_step": steps,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
    }


@pytest.mark.parametrize("name", ["optimizer_states", "lr_schedulers"])
@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_states_is_refused(tiny_backbone, saved, name, count):
    checkpoint = saved | {name: saved[name] * count}
    ((setting, place, old, new),) = optimizer_differences(checkpoint, module_of(tiny_backbone))
    assert (setting, place, old, new) == ("model.optimizer", f"length of {name}", count, 1)


def test_optimizer_of_a_subclass_is_its_own(tiny_backbone, saved):
    class Module(GateRAModule):
        def configure_optimizers(self):
            raise NotImplementedError

    module = module_of(tiny_backbone)
    module.__class__ = Module
    changed = copy.deepcopy(saved)
    changed["optimizer_states"][0]["param_groups"][0]["weight_decay"] = 9.0
    assert not list(optimizer_differences(changed, module))
    assert list(optimizer_differences(changed, module_of(tiny_backbone)))


MOMENTS = [
    ("state[0].exp_avg", torch.zeros(1), "has the shape (1,); accepted: "),
    ("state[3].exp_avg_sq", torch.tensor(0.0), "has the shape (); accepted: "),
    ("state[0].exp_avg", float("nan"), "holds values that AdamW cannot write; accepted: finite numbers"),
    ("state[0].exp_avg_sq", -1.0, "holds values that AdamW cannot write; accepted: finite numbers of"),
    ("state[0]", {}, "lacks step, exp_avg, exp_avg_sq of model.layers.0.self_attn.q_proj.update."),
    ("param_groups[0].params", [0], "has 1 parameters; accepted: 20"),
]


@pytest.mark.parametrize(
    ("place", "value", "message"), MOMENTS, ids=[f"{place} {value}" for place, value, _ in MOMENTS]
)
def test_moments_of_other_parameters_are_refused_before_training(
    tiny_backbone, tmp_path, saved, monkeypatch, place, value, message
):
    monkeypatch.setattr(GateRAModule, "on_train_start", lambda self: pytest.fail("training has started"))
    checkpoint = copy.deepcopy(saved)
    owner = checkpoint["optimizer_states"][0]
    *keys, last = [int(key) if key.isdigit() else key for key in re.findall(r"\w+", place)]
    for key in keys:
        owner = owner[key]
    owner[last] = torch.full_like(owner[last], value) if isinstance(value, float) else value
    if last == "params":  # of the others there are no moments
        checkpoint["optimizer_states"][0]["state"] = {0: saved["optimizer_states"][0]["state"][0]}
        checkpoint["optimizer_states"][0]["param_groups"][1]["params"] = []
    path = tmp_path / "changed.ckpt"
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError) as caught:
        tiny_trainer(tmp_path).fit(
            module_of(tiny_backbone), datamodule=tiny_data(tiny_backbone), ckpt_path=path
        )
    expected = f"{path}: the checkpoint is corrupt: its entry optimizer_states[0].{place} {message}"
    assert str(caught.value).startswith(expected)


def test_moments_are_of_the_optimizers_parameters(tiny_backbone, tmp_path):
    """In the optimizer's order, and of its shapes."""
    module = module_of(tiny_backbone)
    module.configure_model()
    optimizer, _ = build_optimizer(module.optimizer, module.model, lambda: 4)
    groups = parameter_groups(module.model)
    assert [group["name"] for group in optimizer.param_groups] == list(groups) == ["update", "gate"]
    names = {id(parameter): name for name, parameter in adapter_parameters(module.model).items()}
    for group, named in zip(optimizer.param_groups, groups.values(), strict=True):
        assert [names[id(parameter)] for parameter in group["params"]] == list(named)
