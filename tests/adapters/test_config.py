"""Adapter settings: validation, plain values, and the flat gate settings of version 0.1."""

import copy
import inspect
import pickle
import warnings

import pytest

from gatera_lightning import AdapterConfig, ConfigError
from gatera_lightning.adapters.gates import NoGateConfig, StaticGateConfig, TokenGateConfig

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"alpha": 2.0},
            "adapter.alpha: 2.0, but update 'hira' has no scale; accepted: null, or update lora or dora",
        ),
        ({"update": "lora", "alpha": 0.0}, "adapter.alpha: 0.0"),
        ({"update": "lora", "alpha": NAN}, "adapter.alpha: nan"),
        ({"rank": -1}, "adapter.rank: -1"),
        ({"rank": True}, "adapter.rank: True"),
        ({"dropout": -0.1}, "adapter.dropout: -0.1"),
        ({"dropout": NAN}, "adapter.dropout: nan"),
        ({"target_modules": []}, "adapter.target_modules: []; accepted: a list of at least one"),
        ({"target_modules": ["("]}, "adapter.target_modules: '(' is not a regular expression"),
        ({"target_modules": [3]}, "adapter.target_modules: 3 is not a string"),
        ({"layers": [0.5]}, "adapter.layers: [0.5]"),
        (
            {"update": "hira2"},
            "adapter.update: 'hira2' is unknown; accepted: lora, dora, hira, abba, block_hira; did you mean "
            "'hira'?",
        ),
        ({"update": ["hira"]}, "adapter.update: ['hira'] is unknown"),
        (
            {"gate": "tokens"},
            "adapter.gate: 'tokens' is unknown; accepted: none, static, token, hard, threshold, position; "
            "did you mean 'token'?",
        ),
        (
            {"update": "abba", "rank": 5},
            "adapter.rank: 5, but update 'abba' gives half to each product; accepted",
        ),
        (
            {"update": "block_hira", "rank": 5},
            "adapter.rank: 5, but update 'block_hira' has blocks 2; accepted:",
        ),
        (
            {"blocks": 2},
            "adapter.blocks: 2, but update 'hira' has no blocks; accepted: null, or update block_hira",
        ),
        (
            {"update": "block_hira", "blocks": 0},
            "adapter.blocks: 0; accepted: an integer of at least 1, or null",
        ),
        ({"gate": "tokens"}, "did you mean 'token'?"),
        ({"gate": None}, "adapter.gate: is not set"),
        (
            {"adapter_dtype": "float16"},
            "adapter.adapter_dtype: 'float16' is unknown; accepted: float32",
        ),
        ({"gate": TokenGateConfig(bias=NAN)}, "adapter.gate.bias: nan"),
        ({"gate": StaticGateConfig(bias=INFINITY)}, "adapter.gate.bias: inf"),
        ({"gate": TokenGateConfig(entropy_weight=-1)}, "adapter.gate.entropy_weight: -1"),
        ({"gate": TokenGateConfig(lr_multiplier=NAN)}, "adapter.gate.lr_multiplier: nan"),
        ({"gate": TokenGateConfig(skip_below=-0.1)}, "adapter.gate.skip_below: -0.1"),
        ({"gate": TokenGateConfig(skip_below=0.6)}, "adapter.gate.skip_below: 0.6"),
        ({"gate": TokenGateConfig(skip_below=NAN)}, "adapter.gate.skip_below: nan"),
        ({"gate": TokenGateConfig(skip_below="0.1")}, "adapter.gate.skip_below: '0.1'"),
        ({"gate": TokenGateConfig(merge_above=None)}, "adapter.gate.merge_above: None"),
        ({"gate": TokenGateConfig(merge_above=0.4)}, "adapter.gate.merge_above: 0.4"),
        ({"gate": TokenGateConfig(merge_above=1.1)}, "adapter.gate.merge_above: 1.1"),
        (
            {"gate": TokenGateConfig(merge_above=0.9), "update": "lora"},
            "adapter.gate.skip_below: 0.0, merge_above: 0.9, with update 'lora' and dropout 0.0; "
            "accepted: 0 and 1, or update hira or block_hira and dropout 0",
        ),
        (
            {"gate": TokenGateConfig(skip_below=0.1), "dropout": 0.1},
            "adapter.gate.skip_below: 0.1, merge_above: 1.0, with update 'hira' and dropout 0.1",
        ),
    ],
    ids=str,
)
def test_problems_names_invalid_setting(settings, message):
    (problem,) = AdapterConfig(**settings).problems()
    assert message in problem


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(),
        AdapterConfig(update="lora", alpha=0.5, dropout=0.0, layers=[0]),
        AdapterConfig(update="dora", gate="none", rank=1, dropout=0.99),
        AdapterConfig(gate=TokenGateConfig(skip_below=0.5, merge_above=0.5)),
    ],
    ids=repr,
)
def test_problems_accepts_limits(config):
    assert config.problems() == []


def test_gate_name_becomes_its_default_settings():
    assert AdapterConfig(gate="static").gate == StaticGateConfig()
    assert AdapterConfig(gate="none").gate == NoGateConfig()
    assert AdapterConfig().gate == TokenGateConfig()


@pytest.mark.parametrize(
    "gate", [NoGateConfig(), StaticGateConfig(bias=-2.0), TokenGateConfig(bias=1.0, skip_below=0.1)], ids=repr
)
def test_dictionaries_restore_config(gate):
    config = AdapterConfig(gate=gate, rank=8, target_modules=["q_proj"], layers=[1])
    assert AdapterConfig.from_dict(config.to_dict()) == config
    assert AdapterConfig.from_dict(config.to_flat_dict()) == config
    config.to_dict()["target_modules"].append("k_proj")
    assert config.target_modules == ["q_proj"]


def test_dictionaries_hold_plain_values():
    config = AdapterConfig(gate=StaticGateConfig(bias=-2.0), rank=8)
    assert config.to_dict()["gate"] == {
        "kind": "static",
        "lr_multiplier": 1.0,
        "bias": -2.0,
        "entropy_weight": 0.01,
    }
    flat = config.to_flat_dict()
    assert (flat["gate"], flat["gate_bias"], flat["rank"]) == ("static", -2.0, 8)
    assert AdapterConfig(gate="unknown").to_dict()["gate"] == "unknown"


@pytest.mark.parametrize(
    "gate", [NoGateConfig(), StaticGateConfig(bias=-2.0), TokenGateConfig(bias=-2.0)], ids=repr
)
def test_from_dict_reads_version_0_1(gate):
    values = {"update": "dora", "gate": gate.kind, "rank": 8, "alpha": 4.0, "dropout": 0.1}
    values |= {"target_modules": ["q_proj"], "layers": None, "adapter_dtype": "float32"}
    values |= {"gate_bias": getattr(gate, "bias", -2.0), "skip_below": 0.0, "merge_above": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = AdapterConfig.from_dict(values)
    kind = type(gate)
    assert config.gate == (kind() if kind is NoGateConfig else kind(bias=values["gate_bias"]))
    assert (config.update, config.rank, config.alpha) == ("dora", 8, 4.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0.1}, "adapter: unknown settings ['threshold']; accepted: update, gate, rank"),
        ({"gate": {"kind": "soft"}}, "adapter.gate.kind: 'soft' is unknown; accepted: none, static, token"),
        ({"gate": {"bias": 1.0}}, "adapter.gate.kind: None is unknown"),
        ({"gate": {"kind": ["token"]}}, "adapter.gate.kind: ['token'] is unknown"),
        (
            {"gate": {"kind": "static", "skip_below": 0.1}},
            "adapter.gate: a 'static' gate has no skip_below; accepted: lr_multiplier, bias, entropy_weight",
        ),
        ({"gate": "static", "skip_below": 0.1}, "adapter.gate.skip_below: 0.1, with a 'static' gate"),
        ({"gate": "none", "merge_above": 0.9}, "adapter.gate.merge_above: 0.9, with a 'none' gate"),
    ],
    ids=str,
)
def test_from_dict_rejects_unknown_settings(values, message):
    with pytest.raises(ConfigError) as caught:
        AdapterConfig.from_dict(values)
    assert message in str(caught.value)


def test_old_arguments_set_gate_and_warn():
    with pytest.warns(DeprecationWarning, match=r"gate_bias=….*; use gate=TokenGateConfig\(bias=…") as seen:
        config = AdapterConfig(rank=4, gate_bias=-2.0, skip_below=0.1, merge_above=0.9)
    gate = TokenGateConfig(bias=-2.0, skip_below=0.1, merge_above=0.9)
    assert config == AdapterConfig(rank=4, gate=gate)
    assert len(seen) == 1
    with pytest.warns(DeprecationWarning, match="deprecated"):
        assert AdapterConfig(gate="static", gate_bias=1.0).gate == StaticGateConfig(bias=1.0)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        assert AdapterConfig(gate="none", gate_bias=1.0).gate == NoGateConfig()
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),
        pytest.raises(ConfigError, match="with a 'static' gate"),
    ):
        AdapterConfig(gate="static", skip_below=0.1)


def test_old_arguments_are_not_in_signature():
    names = list(inspect.signature(AdapterConfig).parameters)
    assert names[:3] == ["update", "gate", "rank"]
    assert not {"gate_bias", "skip_below", "merge_above", "args", "settings"} & set(names)


def test_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="treshold"):
        AdapterConfig(treshold=0.1)


def test_pickled_config_of_version_0_1_is_restored():
    state = {"update": "hira", "gate": "token", "rank": 8, "alpha": None, "dropout": 0.0}
    state |= {"target_modules": ["q_proj"], "layers": None, "adapter_dtype": "float32"}
    state |= {"gate_bias": -2.0, "skip_below": 0.1, "merge_above": 1.0}
    config = AdapterConfig.__new__(AdapterConfig)
    config.__setstate__(state)
    assert config == AdapterConfig(
        rank=8, target_modules=["q_proj"], gate=TokenGateConfig(bias=-2.0, skip_below=0.1)
    )


def test_config_can_be_copied_and_pickled():
    config = AdapterConfig(gate=TokenGateConfig(bias=-2.0))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
