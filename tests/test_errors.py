"""The wording that messages share."""

import json
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Literal

import pytest
import yaml

import gatera_lightning as gl
from gatera_lightning.errors import as_yaml, printable, type_problems, unknown_value


class Color(StrEnum):
    RED = "red"


def test_printable_escapes_what_would_control_the_terminal():
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b[31m\r\x07\x7f\x9b\u202e é🐝") == r"\u001b[31m\u000d\u0007\u007f\u009b\u202e é🐝"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1, "1"),
        (0.5, "0.5"),
        ("null", "'null'"),
        ([None, "a", (False,)], "[null, 'a', [false]]"),
        ({"a": None, "b": {}}, "{a: null, b: {}}"),
        (Color.RED, "'red'"),
    ],
)
def test_value_is_written_as_in_a_config(value, text):
    assert as_yaml(value) == text
    assert yaml.safe_load(text) == json.loads(json.dumps(getattr(value, "value", value)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hirra", "update: 'hirra' is unknown; accepted: lora, hira; did you mean 'hira'?"),
        ("x", "update: 'x' is unknown; accepted: lora, hira"),
        (3, "update: 3 is unknown; accepted: lora, hira"),
        (None, "update: is not set; accepted: lora, hira"),
    ],
)
def test_unknown_value_names_accepted_and_closest_names(value, message):
    assert unknown_value("update", value, ["lora", "hira"]) == message


@dataclass
class Settings:
    rate: float = 0.5
    count: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    quiet: bool = False
    name: str = "x"
    names: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, None),
        ({"rate": 1, "count": 3, "mode": "slow", "names": ["a"]}, None),
        ({"rate": float("nan")}, "s.rate: nan; accepted: a finite number"),
        (
            {"rate": "1e-3"},
            "s.rate: '1e-3'; accepted: a finite number; '1e-3' is a text: write 0.001 without quotes",
        ),
        ({"rate": "fast"}, "s.rate: 'fast'; accepted: a finite number"),
        ({"rate": "nan"}, "s.rate: 'nan'; accepted: a finite number"),
        (
            {"count": "3"},
            "s.count: '3'; accepted: an integer, or null; '3' is a text: write 3 without quotes",
        ),
        ({"count": "3.5"}, "s.count: '3.5'; accepted: an integer, or null"),
        ({"rate": True}, "s.rate: True; accepted: a finite number"),
        ({"count": 1.0}, "s.count: 1.0; accepted: an integer, or null"),
        ({"mode": "fats"}, "s.mode: 'fats' is unknown; accepted: fast, slow; did you mean 'fast'?"),
        ({"mode": ["fast"]}, "s.mode: ['fast'] is unknown; accepted: fast, slow"),
        ({"quiet": 1}, "s.quiet: 1; accepted: true, false"),
        ({"name": None}, "s.name: None; accepted: text"),
        ({"names": None}, "s.names: None; accepted: a list of str"),
    ],
)
def test_type_problems_name_setting_value_and_accepted_type(values, problem):
    assert list(type_problems("s", Settings(**values)).values()) == ([] if problem is None else [problem])


CONFIGS = [gl.AdapterConfig, gl.BackboneConfig, gl.OptimizerConfig, gl.DecodingConfig]
CONFIGS += [gl.TokenGateConfig, gl.StaticGateConfig, gl.NoGateConfig]
CONFIGS += [gl.HardGateConfig, gl.ThresholdGateConfig]
WRONG = [None, "x", "", -1, 1.5, float("nan"), float("inf"), True, [], {}, 10**30, b"x", ["x"], object()]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_with_value_of_wrong_kind_is_named(config):
    for setting in fields(config):
        for value in WRONG:
            problems = config(**{setting.name: value}).problems()
            assert all(setting.name in problem for problem in problems), (setting.name, value, problems)
            is_default = value == getattr(config(), setting.name)
            assert problems or is_default or value in (None, "x", "", -1, 1.5, True, 10**30, ["x"]), (
                setting.name,
                value,
            )
