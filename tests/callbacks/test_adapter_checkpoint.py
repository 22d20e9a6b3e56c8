"""Tests of AdapterCheckpoint: what checkpoints contain, their adapter folders, and which are kept."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning import BackboneConfig, GateRAModule, adapter_parameters, load_adapter
from gatera_lightning.adapters.peft_schema import to_peft_tensor
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.errors import CheckpointError

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
IDS = torch.arange(3, 43).reshape(2, 20)


def fit(folder, root, checkpoint, **settings):
    module = tiny_module(
        folder, warmup_steps=100
    )  # the learning rate rises, so that there is a value to monitor
    defaults = {"limit_val_batches": 1.0, "val_check_interval": 2}
    trainer = tiny_trainer(root, checkpoint, **(defaults | settings))
    trainer.fit(module, datamodule=tiny_data(folder))
    return module, trainer


def names(root):
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def tensors(value):
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)


@pytest.fixture(scope="module")
def trained(tiny_backbone, tmp_path_factory):
    """A run of four steps with a validation after every second one, and the default settings."""
    root = tmp_path_factory.mktemp("run")
    module, trainer = fit(tiny_backbone, root, AdapterCheckpoint())
    return root, module, trainer


def test_checkpoints_have_adapter_folders_beside_them(trained):
    root, _, trainer = trained
    (best,) = (name for name in names(root) if name.startswith("best-step=") and name.endswith(".ckpt"))
    assert names(root) == sorted([best, best.removesuffix(".ckpt"), "last", "last-1.ckpt", "last.ckpt"])
    assert trainer.checkpoint_callback.best_model_path.endswith(best)
    for folder in ("last", best.removesuffix(".ckpt")):
        assert {path.name for path in (root / "checkpoints" / folder).iterdir()} == FILES


def test_best_checkpoint_has_lowest_validation_loss(tiny_backbone, trained):
    root, _, trainer = trained
    losses = {}
    for name in names(root):
        if name.endswith(".ckpt") and name != "last-1.ckpt":
            module = tiny_module(tiny_backbone)
            module.warm_start = str(root / "checkpoints" / name.removesuffix(".ckpt"))
            (metrics,) = tiny_trainer(root, limit_val_batches=1.0).validate(
                module, datamodule=tiny_data(tiny_backbone), verbose=False
            )
            losses[name] = metrics["val/loss"]
    assert min(losses.values()) == pytest.approx(float(trainer.checkpoint_callback.best_model_score))


@pytest.mark.parametrize("name", ["last", "best"])
def test_checkpoint_contains_no_backbone_tensor(trained, name):
    root, module, _ = trained
    path = min((root / "checkpoints").glob(f"{name}*.ckpt"), key=lambda path: -len(path.name))
    checkpoint = torch.load(path, weights_only=True)
    adapter = adapter_parameters(module.model)
    assert set(checkpoint["state_dict"]) == {f"model.{key}" for key in adapter}
    size = sum(p.numel() * p.element_size() for p in adapter.values())
    moments = list(tensors(checkpoint["optimizer_states"][0]["state"]))
    assert sum(t.numel() for t in moments if t.ndim) == 2 * sum(p.numel() for p in adapter.values())
    random_state = sum(t.numel() * t.element_size() for t in tensors(checkpoint["callbacks"]))
    assert 0 < random_state < 12_000
    everything = sum(t.numel() * t.element_size() for t in tensors(checkpoint))
    assert everything <= 3 * size + random_state + 4096  # position of the loader, step counters, last metrics
    backbone = [p for key, p in module.model.named_parameters() if key not in adapter]
    assert everything < sum(p.numel() * p.element_size() for p in backbone)
    assert not any(
        t.shape == p.shape and torch.equal(t, p.to(t.dtype)) for t in tensors(checkpoint) for p in backbone
    )
    assert path.stat().st_size < everything + 100_000


def test_last_checkpoint_matches_module(tiny_backbone, trained):
    root, module, _ = trained
    checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    files = load_file(root / "checkpoints" / "last" / "adapter_model.safetensors")
    for key, parameter in adapter_parameters(module.model).items():
        assert torch.equal(checkpoint["state_dict"][f"model.{key}"], parameter)
        assert torch.equal(files[to_peft_tensor(key)], parameter)


def test_adapter_folder_reproduces_logits(tiny_backbone, trained):
    root, module, _ = trained
    fresh = load_backbone(BackboneConfig(id=str(tiny_backbone), dtype="float32"))
    untrained = fresh(IDS).logits
    load_adapter(fresh, root / "checkpoints" / "last")
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, module.model.eval()(IDS).logits)
        assert not torch.allclose(fresh(IDS).logits, untrained)


def test_module_loads_from_checkpoint_alone(trained):
    root, module, _ = trained
    loaded = GateRAModule.load_from_checkpoint(root / "checkpoints" / "last.ckpt", map_location="cpu")
    assert (loaded.backbone, loaded.adapter, loaded.optimizer) == (
        module.backbone,
        module.adapter,
        module.optimizer,
    )
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(IDS).logits, module.model.eval()(IDS).logits)


def test_checkpoint_of_other_adapter_is_rejected(tiny_backbone, trained):
    root, *_ = trained
    other = tiny_module(tiny_backbone, update="lora", gate="none")
    with pytest.raises(
        CheckpointError,
        match=r"holds update=hira gate=token rank=4 scale=1\.0, but the model was adapted with",
    ):
        tiny_trainer(root, limit_val_batches=1).validate(
            other, datamodule=tiny_data(tiny_backbone), ckpt_path=str(root / "checkpoints" / "last.ckpt")
        )


def test_worse_checkpoint_is_removed_with_its_folder(tiny_backbone, tmp_path):
    fit(tiny_backbone, tmp_path, AdapterCheckpoint(monitor="lr/update", mode="max"))
    assert names(tmp_path) == ["best-step=4", "best-step=4.ckpt", "last", "last-1.ckpt", "last.ckpt"]


def test_best_checkpoint_is_kept(tiny_backbone, tmp_path):
    fit(tiny_backbone, tmp_path, AdapterCheckpoint(monitor="lr/update", mode="min"))
    assert names(tmp_path) == ["best-step=2", "best-step=2.ckpt", "last", "last-1.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "best-step=2.ckpt", weights_only=True)["global_step"] == 2


def test_save_top_k_keeps_several_checkpoints(tiny_backbone, tmp_path):
    fit(tiny_backbone, tmp_path, AdapterCheckpoint(monitor="lr/update", mode="max", save_top_k=2))
    assert names(tmp_path) == [
        "best-step=2",
        "best-step=2.ckpt",
        "best-step=4",
        "best-step=4.ckpt",
        "last",
        "last-1.ckpt",
        "last.ckpt",
    ]


def test_without_monitor_only_last_checkpoints_are_kept(tiny_backbone, tmp_path):
    fit(tiny_backbone, tmp_path, AdapterCheckpoint(monitor=None))
    assert names(tmp_path) == ["last", "last-1.ckpt", "last.ckpt"]


@pytest.mark.parametrize(("interval", "steps"), [(2, 6), (4, 6)], ids=["at a validation", "between two"])
def test_last_checkpoint_is_end_of_training_without_improvement(tiny_backbone, tmp_path, interval, steps):
    """The learning rate rises, so its lowest value is the first."""
    fit(
        tiny_backbone,
        tmp_path,
        AdapterCheckpoint(monitor="lr/update", mode="min"),
        val_check_interval=interval,
        max_steps=steps,
    )
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == steps
    assert f"best-step={interval}.ckpt" in names(tmp_path)


# --- paths in a checkpoint ---


@pytest.fixture
def owner(tmp_path):
    """A callback whose folder is ``run/checkpoints``, a file and a folder elsewhere, and its state."""
    callback = AdapterCheckpoint(save_top_k=2)
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    callback.dirpath = str(folder)
    for path in (tmp_path / "precious.ckpt", tmp_path / "precious" / "file", folder / "best-step=1.ckpt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    (folder / "best-step=1").mkdir()
    (folder / "link.ckpt").symlink_to(tmp_path / "precious.ckpt")
    (folder / "inner").symlink_to(tmp_path)
    return callback, folder


FOREIGN = [
    "../../precious.ckpt",
    "../../precious",
    "link.ckpt",
    "inner/precious.ckpt",
    "inner/precious",
    "../checkpoints/../../precious.ckpt",
    "",
    ".ckpt/..",
]


@pytest.mark.parametrize("path", FOREIGN)
def test_path_outside_of_the_run_is_never_removed(owner, tmp_path, path):
    callback, folder = owner
    own, foreign = str(folder / "best-step=1.ckpt"), str(folder / path)
    scores = {own: torch.tensor(1.0), foreign: torch.tensor(2.0)}
    state = callback.state_dict() | {
        "best_k_models": scores,
        "kth_best_model_path": foreign,
        "last_model_path": foreign,
        "best_model_path": own,
    }
    callback.load_state_dict(state)
    assert callback.best_k_models == {own: scores[own]}
    assert (callback.kth_best_model_path, callback.last_model_path) == (own, "")
    trainer = tiny_trainer(tmp_path)
    callback._remove_checkpoint(trainer, foreign)
    assert (tmp_path / "precious.ckpt").read_text() == "precious"
    assert (tmp_path / "precious" / "file").read_text() == "precious"
    assert folder.is_dir()
    assert (folder / "best-step=1.ckpt").exists()


def test_own_paths_are_restored_and_removed(owner, tmp_path):
    callback, folder = owner
    own = str(folder / "best-step=1.ckpt")
    state = callback.state_dict() | {
        "best_k_models": {own: torch.tensor(1.0)},
        "kth_best_model_path": own,
        "last_model_path": str(folder / "last.ckpt"),
    }
    callback.load_state_dict(state)
    assert callback.state_dict() == state
    callback._remove_checkpoint(tiny_trainer(tmp_path), own)
    assert not (folder / "best-step=1.ckpt").exists()
    assert not (folder / "best-step=1").exists()
