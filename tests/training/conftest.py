"""A module on the tiny backbone, and batches by hand."""

import pytest
import torch

from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.datamodules.batch import IGNORE_INDEX


@pytest.fixture
def build(tiny_backbone):
    """``build(gate={…}, adapter={…}, **settings)``: a module of rank 4 with its model loaded."""

    def built(*, gate=None, adapter=None, **settings):
        module = GateRAModule(
            backbone=BackboneConfig(id=str(tiny_backbone), dtype="float32"),
            adapter=AdapterConfig(
                **({"rank": 4, "gate": TokenGateConfig(**({"bias": 0.3} | (gate or {})))} | (adapter or {}))
            ),
            optimizer=OptimizerConfig(),
            **settings,
        )
        module.configure_model()
        return module

    return built


@pytest.fixture
def batch_of():
    """``batch_of(labels)``: a batch without padding whose labels are these."""

    def built(labels):
        labels = torch.tensor(labels)
        return {
            "input_ids": torch.arange(labels.numel()).reshape(labels.shape) % 90 + 3,
            "attention_mask": torch.ones_like(labels),
            "labels": labels,
            "response_mask": labels != IGNORE_INDEX,
            "example_ids": torch.arange(len(labels)),
            "answer_ids": torch.zeros(len(labels), dtype=torch.long),
            "gold_ids": torch.zeros(len(labels), dtype=torch.long),
            "all_candidates_present": False,
            "step_supervised_tokens": int((labels[:, 1:] != IGNORE_INDEX).sum()),
            "step_tokens": labels.numel(),
        }

    return built
