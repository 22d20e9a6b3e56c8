"""A checkpoint names no files of other folders as those of any checkpoint callback."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.checkpoint_paths import keep_own_paths
from gatera_lightning.errors import CheckpointError


def every_step(folder):
    settings = {"save_top_k": 1, "monitor": "train/loss", "every_n_train_steps": 1}
    return ModelCheckpoint(dirpath=folder, **settings)


@pytest.mark.parametrize("path", ["../victim", "../victim/file.ckpt", "sub/../../victim", "/etc/passwd", ""])
def test_paths_outside_of_the_folder_are_dropped(tmp_path, path):
    callback = every_step(tmp_path / "mine")
    own, foreign = str(tmp_path / "mine" / "a.ckpt"), str(tmp_path / "mine" / path)
    state = {"best_k_models": {own: torch.tensor(1.0), foreign: torch.tensor(9.0)}}
    state |= {"kth_best_model_path": foreign, "last_model_path": foreign, "kth_value": torch.tensor(9.0)}
    checkpoint = {"callbacks": {callback.state_key: state}}
    keep_own_paths(checkpoint, [callback])
    kept = checkpoint["callbacks"][callback.state_key]
    assert set(kept["best_k_models"]) == {own}
    assert (kept["kth_best_model_path"], kept["last_model_path"]) == (own, "")


@pytest.mark.parametrize("state", [[1], {"best_k_models": [1]}])
def test_state_of_another_type_is_refused(tmp_path, state):
    callback = every_step(tmp_path)
    with pytest.raises(CheckpointError, match="state of ModelCheckpoint is not a mapping"):
        keep_own_paths({"callbacks": {callback.state_key: state}}, [callback])


def subfolders(folder):
    """A user's own ModelCheckpoint with a folder for each checkpoint."""
    settings = {"save_top_k": 1, "monitor": "train/loss", "mode": "max", "every_n_train_steps": 1}
    return ModelCheckpoint(dirpath=folder, filename="{step}/adapter", **settings)


def test_checkpoints_in_subfolders_are_its_own(tmp_path):
    callback = subfolders(tmp_path / "mine")
    own = str(tmp_path / "mine" / "step=2" / "adapter.ckpt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "link").symlink_to(tmp_path / "elsewhere")
    foreign = str(tmp_path / "mine" / "link" / "adapter.ckpt")
    state = {"best_k_models": {own: torch.tensor(1.0), foreign: torch.tensor(0.0)}, "last_model_path": own}
    checkpoint = {"callbacks": {callback.state_key: state | {"kth_best_model_path": own}}}
    keep_own_paths(checkpoint, [callback])
    kept = checkpoint["callbacks"][callback.state_key]
    assert set(kept["best_k_models"]) == {own}
    assert (kept["kth_best_model_path"], kept["last_model_path"]) == (own, own)


def test_resumed_run_keeps_its_best_of_all_in_subfolders(tiny_backbone, tmp_path):
    """A resumed run that forgot its best checkpoint would keep a second one."""
    data, folder = tiny_data(tiny_backbone), tmp_path / "mine"
    tiny_trainer(tmp_path, subfolders(folder), max_steps=2).fit(tiny_module(tiny_backbone), datamodule=data)
    (best,) = folder.glob("*/*.ckpt")
    trainer = tiny_trainer(tmp_path, subfolders(folder), max_steps=4)
    trainer.fit(tiny_module(tiny_backbone), datamodule=data, ckpt_path=best)
    assert len(list(folder.glob("*/*.ckpt"))) == 1


def test_resumed_run_removes_no_folder_outside(tiny_backbone, tmp_path):
    """A user's own ModelCheckpoint, whose state in the checkpoint names a foreign folder as its worst."""
    victim = tmp_path / "victim" / "sub"
    victim.mkdir(parents=True)
    data = tiny_data(tiny_backbone)
    trainer = tiny_trainer(tmp_path, every_step(tmp_path / "mine"), max_steps=2)
    trainer.fit(tiny_module(tiny_backbone), datamodule=data)
    trainer.save_checkpoint(tmp_path / "hostile.ckpt")
    checkpoint = torch.load(tmp_path / "hostile.ckpt", weights_only=True)
    (state,) = (s for k, s in checkpoint["callbacks"].items() if k.startswith("ModelCheckpoint"))
    foreign = str(tmp_path / "mine" / ".." / "victim" / "sub")
    state |= {"best_k_models": {foreign: torch.tensor(1e9)}, "kth_best_model_path": foreign}
    state["kth_value"] = torch.tensor(1e9)
    torch.save(checkpoint, tmp_path / "hostile.ckpt")
    trainer = tiny_trainer(tmp_path, every_step(tmp_path / "mine"), max_steps=4)
    trainer.fit(tiny_module(tiny_backbone), datamodule=data, ckpt_path=tmp_path / "hostile.ckpt")
    assert victim.is_dir()
