"""Means that objectives measure, over the validation split and over each of its tasks."""

import json
import math

import pytest
import torch
from tiny_backbone import sample_rows, tiny_data, tiny_trainer

from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.datamodules.validation_tasks import validation_tasks
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives import NextToken, SelfDraft
from gatera_lightning.objectives.base import Mean
from gatera_lightning.training.objective_means import ObjectiveMeans


class Squares(NextToken):
    """Measures the squares of given numbers, by sequence."""

    validation_names = ("loss", "square")
    names_by_task = ("square",)

    def validate(self, model, batch):
        numbers = torch.tensor(batch["numbers"], dtype=torch.float32)
        squares = Mean(numbers**2, (numbers > 0).long())
        return {"loss": Mean(numbers.sum(), len(numbers)), "square": squares}


def compute(means, batches):
    for examples, numbers in batches:
        logged = means.update(None, {"example_ids": torch.tensor(examples), "numbers": numbers})
    return {name: float(mean.compute()) for name, mean in logged.items()}


def test_means_are_weighted_by_elements_and_exclude_dummy_examples_from_tasks():
    means = ObjectiveMeans([Squares()])
    means.reset({0: "a.x", 1: "b", 2: "a.x", 3: "c"})
    found = compute(means, [([0, 1], [1, 2]), ([2, -1, 2], [3, 5, 0])])
    # Two of a.x have an element, one of b, none of c; the dummy example is in no task.
    assert math.isnan(found.pop("val/square/c"))
    assert found == {
        "val/loss": pytest.approx(11 / 5),
        "val/square": (1 + 4 + 9 + 25) / 4,
        "val/square/a.x": (1 + 9) / 2,
        "val/square/b": 4.0,
    }
    means.reset({})
    assert compute(means, [([0, 1], [1, 2])]) == {"val/loss": 1.5, "val/square": 2.5}


@pytest.fixture
def two_tasks(tiny_backbone, tmp_path):
    """Five validation examples of the embedded sample and three of a file."""
    path = tmp_path / "other.json"
    path.write_text(json.dumps(sample_rows("validation")[:3]))
    return tiny_data(tiny_backbone, validation=["everyday[:5]", str(path)], train_on="all")


def draft_module(folder):
    return GateRAModule(
        backbone=BackboneConfig(id=str(folder), dtype="float32"),
        adapter=AdapterConfig(update="lora", gate="position", rank=4),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0),
        objectives=[SelfDraft([2])],
    )


def test_acceptance_of_a_task_is_that_of_its_examples_alone(tiny_backbone, tmp_path, two_tasks, monkeypatch):
    # Random ids would depend on the other examples of a batch.
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.zeros(size, dtype=torch.long))
    module, trainer = draft_module(tiny_backbone), tiny_trainer(tmp_path, limit_val_batches=1.0)
    (found,) = trainer.validate(module, datamodule=two_tasks, verbose=False)
    tasks = validation_tasks(two_tasks)
    assert sorted(tasks.values()) == ["everyday"] * 5 + ["other"] * 3
    names = [name for name in found if name.endswith("/everyday")]
    assert len(names) == 4  # not the loss
    for data in (
        tiny_data(tiny_backbone, validation=["everyday[:5]"], train_on="all"),
        tiny_data(tiny_backbone, validation=[str(tmp_path / "other.json")], train_on="all"),
    ):
        (alone,) = tiny_trainer(tmp_path, limit_val_batches=1.0).validate(
            module, datamodule=data, verbose=False
        )
        task = "everyday" if len(data.tables["validation"]) == 5 else "other"
        assert not [name for name in alone if name.endswith(task)]
        for name in names:
            name = name.removesuffix("/everyday")
            assert found[f"{name}/{task}"] == pytest.approx(alone[name]), name


def test_a_mean_of_a_task_is_monitored(tiny_backbone, tmp_path, two_tasks):
    settings = {"limit_val_batches": 1.0, "val_check_interval": 1, "max_steps": 1}
    checkpoint = AdapterCheckpoint(monitor="val/acceptance_1/other")
    trainer = tiny_trainer(tmp_path, checkpoint, **settings)
    trainer.fit(draft_module(tiny_backbone), datamodule=two_tasks)
    assert checkpoint.best_model_score == trainer.callback_metrics["val/acceptance_1/other"]
    checkpoint = AdapterCheckpoint(monitor="val/acceptance_1/othr")
    with pytest.raises(ConfigError, match=r"never logged; .*did you mean 'val/acceptance_1/other'"):
        tiny_trainer(tmp_path, checkpoint, **settings).fit(draft_module(tiny_backbone), datamodule=two_tasks)
