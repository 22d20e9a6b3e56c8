import pytest
import torch

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
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits

    return compute
