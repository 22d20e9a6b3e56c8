from contextlib import nullcontext

import pytest
import torch

from gatera_lightning import position_mask
from gatera_lightning.adapters.gates.position import PositionGate

pytest.importorskip("peft", reason="needs the package peft")


@pytest.fixture(scope="session")
def backbone_folder(tiny_llama, tmp_path_factory):
    """The folder of a tiny Llama, for calls that load a model by its path."""
    folder = tmp_path_factory.mktemp("backbone")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def logits():
    """Return a function that computes the logits of two short sequences."""

    def compute(model):
        ids = torch.arange(12).reshape(2, 6)
        needs_mask = any(isinstance(module, PositionGate) for module in model.modules())
        with torch.no_grad(), position_mask(model, ids % 3 > 0) if needs_mask else nullcontext():
            return model.eval()(input_ids=ids).logits

    return compute
