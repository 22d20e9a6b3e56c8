"""Settings as plain values in checkpoints, and checkpoints that version 0.1 wrote from Python."""

import warnings
from pathlib import Path

import pytest
import torch

from gatera_lightning import AdapterConfig, BackboneConfig, ConfigError, GateRAModule, OptimizerConfig
from gatera_lightning.adapters.gates import NoGateConfig, StaticGateConfig, TokenGateConfig
from gatera_lightning.cli.main import main
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.training.hyperparameters import from_plain, read_hyperparameters, to_plain

OLD = Path(__file__).parent / "data" / "version_0_1.ckpt"
"""Two steps on ``OLD_BACKBONE`` with ``OLD_SETTINGS``; holds pickled settings classes."""

OLD_BACKBONE = Path(__file__).parents[1] / "integration" / "data" / "version_0_1" / "backbone"
OLD_SETTINGS = {
    "backbone": BackboneConfig(id="backbone", dtype="float32"),
    "adapter": AdapterConfig(
        rank=4, gate=TokenGateConfig(bias=0.25, skip_below=0.1, entropy_weight=0.05, lr_multiplier=2.0)
    ),
    "optimizer": OptimizerConfig(lr=1e-2, warmup_steps=1),
    "decoding": DecodingConfig(beams=2),
    "warm_start": None,
}


@pytest.mark.parametrize(
    "gate", [TokenGateConfig(bias=-2.0, skip_below=0.1), StaticGateConfig(), NoGateConfig()]
)
def test_settings_survive_as_plain_values(gate):
    settings = OLD_SETTINGS | {"adapter": AdapterConfig(rank=8, gate=gate, layers=[1]), "decoding": None}
    plain = to_plain(settings)
    assert from_plain(plain) == settings
    for section in ("backbone", "adapter", "optimizer"):
        assert type(plain[section]) is dict
    assert plain["adapter"]["gate"]["kind"] == gate.kind


def test_module_saves_plain_values_only():
    module = GateRAModule(**OLD_SETTINGS)
    assert dict(module.hparams) == dict(module.hparams_initial) == to_plain(OLD_SETTINGS)


def test_subclass_arguments_are_saved():
    class Module(GateRAModule):
        def __init__(self, temperature, **settings):
            super().__init__(**settings)

    assert Module(0.5, **OLD_SETTINGS).hparams == to_plain(OLD_SETTINGS) | {"temperature": 0.5}


@pytest.mark.parametrize(
    "gate",
    [
        "token",
        {"kind": "token", "bias": 0.25},
        {"class_path": "TokenGateConfig", "init_args": {"bias": 0.25}},
        {"class_path": "gatera_lightning.adapters.gates.TokenGateConfig", "init_args": {"bias": 0.25}},
    ],
)
def test_spellings_of_command_line_are_read(gate):
    adapter = {"rank": 4, "gate": gate} | ({"gate_bias": 0.25} if gate == "token" else {})
    found = from_plain({"adapter": adapter, "_instantiator": "lightning.pytorch.cli.instantiate_module"})
    assert found == {"adapter": AdapterConfig(rank=4, gate=TokenGateConfig(bias=0.25))}


def test_gate_settings_of_version_0_1_are_moved_without_warning():
    plain = {
        "adapter": {"gate": "token"},
        "optimizer": {"lr": 0.5, "gate_lr_multiplier": 2.0},
        "gate_entropy_weight": 0.2,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = from_plain(plain)
    assert found["adapter"].gate == TokenGateConfig(lr_multiplier=2.0, entropy_weight=0.2)
    assert found["optimizer"] == OptimizerConfig(lr=0.5)
    assert from_plain(plain | {"adapter": {"gate": "none"}})["adapter"].gate == NoGateConfig(
        lr_multiplier=2.0
    )


def test_unknown_gate_class_is_rejected():
    with pytest.raises(
        ConfigError, match=r"adapter\.gate\.class_path: 'Cubic' is not registered; accepted: NoGate"
    ):
        from_plain({"adapter": {"gate": {"class_path": "mine.Cubic"}}})


def test_old_checkpoint_loads(recwarn):
    module = GateRAModule.load_from_checkpoint(
        OLD, backbone=BackboneConfig(id=str(OLD_BACKBONE), dtype="float32"), weights_only=True
    )
    for name in ("adapter", "optimizer", "decoding", "warm_start"):
        assert getattr(module, name) == OLD_SETTINGS[name]
    assert module.optimizer.gate_lr_multiplier is None
    assert module.objectives[1].weight == 0.05
    saved = torch.load(OLD, weights_only=True)["state_dict"]
    assert set(module.state_dict()) == set(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
    assert not [warning for warning in recwarn if warning.category is DeprecationWarning]


def test_old_checkpoint_exports(tmp_path):
    assert main(["export", str(OLD), "--out", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_settings_are_read_from_open_file_and_from_yaml(tmp_path):
    with OLD.open("rb") as file:
        found = read_hyperparameters(file)
        assert file.tell() == 0
    assert found["optimizer"] == read_hyperparameters(OLD)["optimizer"] != OptimizerConfig()
    (tmp_path / "hparams.yaml").write_text(
        "optimizer: {lr: 0.5, gate_lr_multiplier: 2.0}\nadapter: {gate: static}\n"
    )
    found = read_hyperparameters(OLD, tmp_path / "hparams.yaml")
    assert found["optimizer"] == OptimizerConfig(lr=0.5)
    assert found["adapter"].gate == StaticGateConfig(lr_multiplier=2.0)


@pytest.mark.parametrize("as_class", [False, True], ids=["values", "class"])
def test_checkpoint_does_not_switch_on_remote_code(as_class, caplog):
    backbone = {"id": "nobody/model", "trust_remote_code": True}
    found = from_plain({"backbone": BackboneConfig(**backbone) if as_class else backbone})
    assert found["backbone"] == BackboneConfig(id="nobody/model")
    assert "trust_remote_code true, which is ignored" in caplog.text
