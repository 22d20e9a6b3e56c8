"""An error that only rank 0 meets while it loads the model reaches all ranks."""

import pickle
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from launched_ranks import SHARDED, assert_refused

from gatera_lightning import AdapterConfig, BackboneConfig
from gatera_lightning.distributed import sharded_loading


@pytest.fixture
def backbone_copy(tiny_backbone, tmp_path):
    return shutil.copytree(tiny_backbone, tmp_path / "copy")


@pytest.mark.slow
def test_fit_reports_corrupt_weights_once(launch, backbone_copy):
    file = backbone_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    ended = launch.two([*SHARDED, "--model.backbone.id", str(backbone_copy)], [], [])
    assert_refused(ended, f"backbone.id: the weights of '{backbone_copy}' are corrupt (")


@pytest.mark.slow
def test_fit_reports_missing_weights_once(launch, backbone_copy):
    (backbone_copy / "model.safetensors").unlink()
    ended = launch.two([*SHARDED, "--model.backbone.id", str(backbone_copy)], [], [])
    assert_refused(ended, f"backbone.id: cannot load the folder '{backbone_copy}'")


def test_load_sharded_sends_error_that_cannot_be_pickled_as_text(monkeypatch):
    """Otherwise the other ranks would wait for a message that rank 0 cannot send."""

    class LockedError(Exception):
        def __init__(self, *, response):
            self.lock = threading.Lock()
            super().__init__(response)

    def fail(*_):
        raise LockedError(response="no such weights")

    monkeypatch.setattr(sharded_loading, "load_config", lambda _: SimpleNamespace())  # no network
    monkeypatch.setattr(sharded_loading, "load_backbone", fail)
    strategy = SimpleNamespace(
        global_rank=0,
        root_device=torch.device("cpu"),
        broadcast=lambda message: pickle.loads(pickle.dumps(message)),
    )
    with pytest.raises(RuntimeError, match="LockedError: no such weights"):
        sharded_loading.load_sharded(BackboneConfig(), AdapterConfig(), strategy, seed=0, warm_start=None)
