"""Adapters from and to the Hugging Face hub by PEFT's own calls; the hub is a folder on this disk."""

import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import hub as transformers_hub

from gatera_lightning import AdapterConfig, inject_adapters, save_adapter
from gatera_lightning.peft import GateRAConfig

REPOSITORY = "somebody/adapter"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository in two revisions; returns the requests that were made."""
    import peft.config
    import peft.utils.save_and_load

    requests = []

    def download(repo_id, filename=None, *, revision=None, token=None, subfolder=None, **_):
        requests.append((repo_id, filename, revision, token))
        path = tmp_path / "hub" / (revision or "main") / (subfolder or "") / filename
        if repo_id != REPOSITORY or constants.HF_HUB_OFFLINE is None or not path.is_file():
            raise LocalEntryNotFoundError(f"{repo_id}/{filename} is not cached, and this machine is offline")
        return str(path)

    for module in (peft.config, peft.utils.save_and_load):
        monkeypatch.setattr(module, "hf_hub_download", download)
    monkeypatch.setattr(peft.utils.save_and_load, "file_exists", lambda **request: True)
    return requests


@pytest.fixture
def load(backbone_folder):
    """Return a function that loads another copy of the backbone."""
    return lambda: AutoModelForCausalLM.from_pretrained(backbone_folder)


@pytest.fixture
def adapted(load, randomize, tmp_path, logits):
    """Return the logits of the adapters that the hub's two revisions hold."""
    found = {}
    for seed, revision in enumerate(("main", "v2")):
        model = load()
        inject_adapters(model, AdapterConfig(rank=3, target_modules=["q_proj"]))
        save_adapter(randomize(model, seed=seed), tmp_path / "hub" / revision)
        found[revision] = logits(model)
    return found


@pytest.mark.parametrize("revision", [None, "v2"])
def test_hub_id_revision_and_token(hub, load, adapted, logits, revision):
    settings = {"token": "secret"} | ({"revision": revision} if revision else {})
    model = PeftModel.from_pretrained(load(), REPOSITORY, **settings)
    assert torch.equal(logits(model), adapted[revision or "main"])
    assert {(request[0], request[3]) for request in hub} == {(REPOSITORY, "secret")}


def test_id_that_does_not_exist_is_one_error(hub, load, adapted):
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'somebody/els"):
        PeftModel.from_pretrained(load(), "somebody/else")


class _Hub:
    """What ``push_to_hub`` asks of the hub, with a folder on this disk as the repository."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **_):
        assert repo_id == REPOSITORY
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.folder / operation.path_in_repo)


def test_push_uploads_the_folder(load, logits, tmp_path, monkeypatch, randomize):
    config = GateRAConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = randomize(get_peft_model(load(), config))
    hub = _Hub(tmp_path)
    monkeypatch.setattr(transformers_hub, "hf_api", lambda: hub)
    model.push_to_hub(REPOSITORY, token="secret")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path)), logits(model))
