"""Spellings of gate settings in configs, flags and checkpoints."""

import copy
import logging
from dataclasses import dataclass

import pytest
import yaml

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gates import GATES, NoGateConfig, StaticGateConfig, TokenGateConfig
from gatera_lightning.adapters.updates import UPDATES
from gatera_lightning.cli.deprecation import announce_deprecation
from gatera_lightning.cli.main import main
from gatera_lightning.cli.settings_syntax import (
    GATE,
    MOVED_SETTINGS,
    SettingsParser,
    describe_choices,
    expand_gate,
    translate_flags,
    translate_settings,
)
from gatera_lightning.errors import ConfigError

TOKEN = "gatera_lightning.adapters.gates.TokenGateConfig"
OLD = {
    "adapter": {"gate_bias": -2.0, "skip_below": 0.1, "merge_above": 0.9},
    "optimizer": {"gate_lr_multiplier": 10.0, "lr": 0.5},
    "gate_entropy_weight": 0.1,
}
NEW = TokenGateConfig(bias=-2.0, skip_below=0.1, merge_above=0.9, lr_multiplier=10.0, entropy_weight=0.1)


@dataclass
class Optimizer:
    """Stands for the optimizer's settings."""

    lr: float = 1e-3


class Model:
    """Stands for GateRAModule."""

    def __init__(self, adapter: AdapterConfig, optimizer: Optimizer) -> None:
        self.adapter = adapter


@pytest.fixture(scope="module")
def parser():
    parser = SettingsParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Model, "model")
    describe_choices(parser)
    return parser


@pytest.fixture
def gate(parser, tmp_path):
    """``gate(*configs, flags=[])``: the gate that configs, as dictionaries or YAML, and flags give."""

    def parse(*configs, flags=()):
        args = []
        for number, config in enumerate(configs):
            path = tmp_path / f"{number}.yaml"
            path.write_text(config if isinstance(config, str) else yaml.safe_dump({"model": config}))
            args += ["--config", str(path)]
        return parser.instantiate_classes(parser.parse_args([*args, *flags])).model.adapter.gate

    return parse


@pytest.fixture
def warnings(caplog):
    """The deprecation warnings of a test, as if it were the first of its process."""
    announce_deprecation.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def config_of(gate):
    return {"adapter": {"gate": gate}}


# --- configs ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("token", TokenGateConfig()),
        ("none", NoGateConfig()),
        ("StaticGateConfig", StaticGateConfig()),
        ({"kind": "static", "bias": -2}, StaticGateConfig(bias=-2.0)),
        ({"class_path": TOKEN, "init_args": {"bias": -2}}, TokenGateConfig(bias=-2.0)),
        ({"class_path": "TokenGateConfig"}, TokenGateConfig()),
        ({"bias": 1.5}, TokenGateConfig(bias=1.5)),
        ({"init_args": {"bias": 1.5}}, TokenGateConfig(bias=1.5)),
    ],
    ids=str,
)
def test_config_accepts_every_spelling_of_a_gate(gate, value, expected):
    assert gate(config_of(value)) == expected


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ({"entropy_weight": 0.5}, TokenGateConfig(bias=-2.0, skip_below=0.1, entropy_weight=0.5)),
        ("token", TokenGateConfig(bias=-2.0, skip_below=0.1)),
        ("static", StaticGateConfig(bias=-2.0)),  # settings that the new kind has as well are kept
        ("none", NoGateConfig()),
    ],
    ids=str,
)
def test_overlay_merges_with_the_gate_before_it(gate, overlay, expected):
    assert gate(config_of({"kind": "token", "bias": -2, "skip_below": 0.1}), config_of(overlay)) == expected


@pytest.mark.parametrize(
    "text", ["gate: {kind: static, bias: 2}", "{gate: static, rank: 4}"], ids=["settings", "name"]
)
def test_file_of_adapter_section_is_translated(gate, tmp_path, text):
    (tmp_path / "adapter.yaml").write_text(text)
    assert isinstance(gate(flags=["--model.adapter", str(tmp_path / "adapter.yaml")]), StaticGateConfig)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "tokn",
            "model.adapter.gate: 'tokn' is unknown; accepted: none, static, token, hard, threshold, "
            "position; did you mean 'token'?",
        ),
        (
            {"kind": "best"},
            "model.adapter.gate: 'best' is unknown; accepted: none, static, token, hard, threshold, position",
        ),
        (
            {"kind": "none", "bias": 2},
            "model.adapter.gate: 'none' has no setting bias; accepted: lr_multiplier",
        ),
    ],
    ids=str,
)
def test_invalid_gate_names_what_is_accepted(gate, value, message):
    with pytest.raises(ConfigError) as caught:
        gate(config_of(value))
    assert str(caught.value) == message


def test_other_documents_are_not_translated():
    for document in (
        "token",
        3,
        None,
        ["gate"],
        {"bias": 1},
        {"skip_below": 0.1},
        {"gate": None},
        {"model": "x"},
    ):
        assert translate_settings(document) == document


def test_dumped_config_names_the_kind_and_loads_again(parser, tmp_path):
    config = parser.parse_args([f"--{GATE}", "static", f"--{GATE}.bias", "-2"])
    text = parser.dump(config)
    settings = {"lr_multiplier": 1.0, "bias": -2.0, "entropy_weight": 0.01}
    assert yaml.safe_load(text)["model"]["adapter"]["gate"] == {"kind": "static", **settings}
    (tmp_path / "again.yaml").write_text(text)
    assert parser.parse_args(["--config", str(tmp_path / "again.yaml")]).model == config.model


# --- flags ---


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([f"--{GATE}", "static"], StaticGateConfig()),
        ([f"--{GATE}=none"], NoGateConfig()),
        ([f"--{GATE}.kind", "static"], StaticGateConfig()),
        ([f"--{GATE}", "{kind: static, bias: -3}"], StaticGateConfig(bias=-3.0)),
        ([f"--{GATE}", TOKEN], TokenGateConfig()),
        ([f"--{GATE}.bias", "-2"], TokenGateConfig(bias=-2.0)),
        ([f"--{GATE}.bias", "-2", f"--{GATE}", "static"], StaticGateConfig(bias=-2.0)),
    ],
    ids=str,
)
def test_flags_accept_every_spelling_of_a_gate(gate, flags, expected):
    assert gate(flags=flags) == expected


def test_flags_win_over_configs(gate):
    assert gate(config_of({"kind": "token", "bias": -2}), flags=[f"--{GATE}", "none"]) == NoGateConfig()


def test_unknown_gate_flag_names_near_miss():
    with pytest.raises(ConfigError, match=r"'sttic' is unknown; .* did you mean 'static'\?"):
        translate_flags(["fit", f"--{GATE}", "sttic"])


def test_other_flags_keep_their_order():
    flags = ["fit", "--config", "a.yaml", "--seed_everything", "3", f"--{GATE}.bias", "1", "--x=--y"]
    assert translate_flags(flags) == flags


def test_help_describes_registered_updates_and_gates(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} = " in text for name in [*UPDATES, *GATES])
    with pytest.raises(SystemExit):
        parser.parse_args([f"--{GATE}.help", "static"])
    assert f"--{GATE}.entropy_weight" in capsys.readouterr().out


# --- deprecated places ---


def test_deprecated_settings_of_config_move_with_one_warning_each(gate, warnings):
    assert gate(OLD) == gate(OLD) == NEW
    assert warnings.messages == [
        f"{old} is deprecated and will be removed in 0.3; use {GATE}.{new}"
        for old, new in MOVED_SETTINGS.items()
    ]


def test_deprecated_flags_move_with_one_warning_each(gate, warnings):
    values = {
        "bias": -2.0,
        "skip_below": 0.1,
        "merge_above": 0.9,
        "lr_multiplier": 10.0,
        "entropy_weight": 0.1,
    }
    flags = [arg for old, new in MOVED_SETTINGS.items() for arg in (f"--{old}", str(values[new]))]
    assert gate(flags=flags) == NEW
    assert warnings.messages == [
        f"--{old} is deprecated and will be removed in 0.3; use --{GATE}.{new}"
        for old, new in MOVED_SETTINGS.items()
    ]


def test_deprecated_settings_of_overlay_merge_with_the_gate_before_it(gate, warnings):
    assert gate(config_of("static"), {"gate_entropy_weight": 0.5}) == StaticGateConfig(entropy_weight=0.5)
    assert gate(OLD, config_of("none")) == NoGateConfig(lr_multiplier=10.0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", NoGateConfig(lr_multiplier=10.0)),
        ("static", StaticGateConfig(bias=-2.0, lr_multiplier=10.0, entropy_weight=0.1)),
    ],
)
def test_deprecated_settings_that_a_kind_lacks_are_dropped(gate, warnings, kind, expected):
    """Configs that version 0.1 saved hold all of them, whatever the gate."""
    assert gate(OLD | {"adapter": {**OLD["adapter"], "gate": kind}}) == expected
    flags = [f"--{old}=0.1" for old in MOVED_SETTINGS]
    assert isinstance(gate(flags=[*flags, f"--{GATE}={kind}"]), GATES[kind])


def test_new_place_wins_over_deprecated_one(gate, warnings):
    settings = {"adapter": {"gate": {"kind": "token", "bias": 1.0}, "gate_bias": -2.0}}
    assert gate(settings) == TokenGateConfig(bias=1.0)


def test_hyperparameters_of_old_checkpoint_are_translated(parser, warnings):
    settings = parser.parse_object({"model": OLD | {"adapter": {**OLD["adapter"], "gate": "token"}}})
    assert parser.instantiate_classes(settings).model.adapter.gate == NEW


def test_sections_below_a_subcommand_are_translated(warnings):
    translated = translate_settings({"seed_everything": 1, "fit": {"model": config_of("none")}})
    assert translated["fit"]["model"]["adapter"]["gate"] == expand_gate("none")
    assert translated["seed_everything"] == 1


def test_translation_does_not_change_its_argument(warnings):
    settings = {"model": {"adapter": {"gate_bias": 1.0}, "gate_entropy_weight": 0.1}}
    before = copy.deepcopy(settings)
    translate_settings(settings)
    assert settings == before


def test_enum_is_written_as_its_value(working_folder, recipe, capsys):
    timer = "{class_path: lightning.pytorch.callbacks.Timer, init_args: {duration: '00:01:00:00'}}"
    with pytest.raises(SystemExit):
        main(["fit", *recipe, "--print_config", "--trainer.callbacks", f"[{timer}]"])
    assert "interval: step" in capsys.readouterr().out
