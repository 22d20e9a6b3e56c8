"""Training batches carry the totals of their step, and the step stays as it was planned."""

import lightning as L
import pytest
import torch
from tiny_backbone import tiny_data, tiny_module, tiny_trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from gatera_lightning import ConfigError


def rows(*names):
    return [dict.fromkeys(names, torch.ones(4, dtype=torch.long)) for _ in range(4)]


def no_weights(monkeypatch):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(rows("input_ids", "labels"), batch_size=2),
        DataLoader(rows("input_ids", "attention_mask", "labels"), batch_size=None),
        DataLoader([torch.ones(3)] * 4),
    ],
    ids=["rows", "batches", "tensors"],
)
def test_own_loader_is_refused_before_weights_are_loaded(tiny_backbone, tmp_path, monkeypatch, loader):
    no_weights(monkeypatch)
    with pytest.raises(ConfigError, match=r"train_dataloaders: its batches lack .*step_supervised_tokens"):
        tiny_trainer(tmp_path).fit(tiny_module(tiny_backbone), loader)


@pytest.mark.parametrize("kind", ["list", "generator"])
def test_own_loader_of_another_kind_is_refused_at_its_first_batch(tiny_backbone, tmp_path, kind):
    batches = rows("input_ids", "attention_mask", "labels")
    loader = Batches(batches) if kind == "list" else DataLoader(Stream(batches), batch_size=None)
    with pytest.raises(ConfigError, match="train_dataloaders: its batches lack step_supervised_tokens"):
        tiny_trainer(tmp_path).fit(tiny_module(tiny_backbone), loader)


class Batches:
    """Lightning would take a list for a list of loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Change(L.Callback):
    """Changes the accumulation where a user's callback might."""

    def __init__(self, hook):
        setattr(self, hook, self.change)

    def change(self, trainer, *_):
        trainer.accumulate_grad_batches = 2


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_end"])
def test_accumulation_that_changes_during_the_run_is_refused(tiny_backbone, tmp_path, hook):
    trainer = tiny_trainer(tmp_path, Change(hook))
    with pytest.raises(ConfigError, match=r"trainer\.accumulate_grad_batches: 2, changed during the run"):
        trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
