"""Short and deprecated spellings of settings, translated into the ones that jsonargparse parses.

jsonargparse selects the settings class of a gate by `class_path` and `init_args`. Configs and flags may name
the kind of gate instead, and may still use the gate settings' places of version 0.1.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, get_loader, set_dumper, set_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from gatera_lightning.adapters import gates
from gatera_lightning.adapters.gates import GATES, GateConfig, describe_gates
from gatera_lightning.adapters.updates import describe_updates
from gatera_lightning.cli.commands import LIGHTNING_SUBCOMMANDS
from gatera_lightning.cli.deprecation import announce_deprecation
from gatera_lightning.cli.error_translation import ParseError
from gatera_lightning.cli.parse_errors import describe
from gatera_lightning.cli.run_callbacks import RUN_CALLBACKS
from gatera_lightning.cli.yaml_checks import check_document
from gatera_lightning.errors import ConfigError, unknown_value

GATE = "model.adapter.gate"

MOVED_SETTINGS = {
    "model.adapter.gate_bias": "bias",
    "model.adapter.skip_below": "skip_below",
    "model.adapter.merge_above": "merge_above",
    "model.optimizer.gate_lr_multiplier": "lr_multiplier",
    "model.gate_entropy_weight": "entropy_weight",
}
"""Where a gate's setting was in version 0.1 -> its name below `model.adapter.gate`."""

_SECTIONS = {"trainer", "model", *RUN_CALLBACKS}

_KIND_FLAGS = (GATE, f"{GATE}.kind")

_PARSER_MODE = "gatera_settings"


class SettingsParser(LightningArgumentParser):
    """A parser of flags, config files and checkpoints' hyperparameters in any of these spellings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("parser_mode", _PARSER_MODE)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    @override
    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse would ignore a full disk or a closed pipe."""
        print(self.format_help(), end="", file=file, flush=True)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an error of parsing as one sentence.

        Raises:
            ParseError: Always, unless jsonargparse tries several types and reports the error itself.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        raise ParseError(describe(self, message)) from ex

    @override
    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line."""
        return super().parse_args(args if args is None else translate_flags(args), *rest, **kwargs)

    @override
    def parse_object(self, cfg_obj: Any, *rest: Any, **kwargs: Any) -> Namespace:
        """Parse settings that are loaded already, such as the hyperparameters of a checkpoint."""
        return super().parse_object(translate_settings(cfg_obj), *rest, **kwargs)


def describe_choices(parser: LightningArgumentParser) -> None:
    """Append the registered updates and gates to the help of the settings that name one."""
    descriptions = {
        "model.adapter.update": describe_updates(),
        GATE: f"{describe_gates()}; or the import path of your own class, such as my_gates.NormGateConfig "
        f"(its module must be on PYTHONPATH). Flags of its settings: --{GATE}.help KIND",
    }
    for action in parser._actions:  # argparse has no public way to find an argument
        if action.dest in descriptions:
            action.help = f"{action.help} {descriptions[action.dest]}"


def translate_settings(settings: Any) -> Any:
    """Translate a config, or a file with one of its sections.

    Args:
        settings: What a YAML document holds: a whole config, its `model` section or its `model.adapter`
            section. Any other value is returned as it is.

    Raises:
        ConfigError: The kind of gate is unknown.
    """
    match settings:
        case {"model": dict(model)}:
            return {**settings, "model": _translate_model(model)}
        case {"adapter": dict()}:
            return _translate_model(settings)
        case {"gate": str() | {"kind": str()}}:
            return {**settings, "gate": expand_gate(settings["gate"])}
        case dict():
            return {
                key: translate_settings(value) if key in LIGHTNING_SUBCOMMANDS else value
                for key, value in settings.items()
            }
    return settings


def translate_flags(argv: Sequence[str]) -> list[str]:
    """Translate the flags of a command line.

    The kind of gate moves in front of the gate's settings, so that the order of these flags does not matter.
    A flag in a deprecated place is dropped if the kind given beside it has no such setting; version 0.1
    ignored it.

    Raises:
        ConfigError: The kind of gate is unknown.
    """
    kinds: list[str] = []
    settings: list[tuple[str, str]] = []
    others: list[str] = []
    position = len(argv)
    config: type[GateConfig] | None = None
    rest = iter(argv)
    for arg in rest:
        flag, _, value = arg.partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name not in (*_KIND_FLAGS, f"{GATE}.help", *MOVED_SETTINGS):
            others.append(arg)
            continue
        position = min(position, len(others))
        value = value if "=" in arg else next(rest, "")
        if name == f"{GATE}.help":
            others.append(f"{flag}={GATES[value].__name__ if value in GATES else value}")
        elif name in MOVED_SETTINGS:
            new_name = MOVED_SETTINGS[name]
            announce_deprecation(flag, f"--{GATE}.{new_name}")
            settings.append((new_name, value))
        else:
            check_document(value, flag)
            gate = expand_gate(get_loader("yaml")(value))
            if not isinstance(gate, str | dict):
                raise ConfigError(unknown_value(GATE, value, GATES))
            config = _config_class(gate)
            kinds.append(f"--{GATE}={json.dumps(gate) if isinstance(gate, dict) else value}")
    moved = [
        f"--{GATE}.{name}={value}" for name, value in settings if config is None or _accepts(config, name)
    ]
    return [*others[:position], *kinds, *moved, *others[position:]]


def expand_gate(gate: Any) -> Any:
    """Translate the value of `model.adapter.gate`.

    Args:
        gate: The name of a kind, `{"kind": NAME, SETTING: VALUE, ...}`, settings without a kind, or any
            spelling of jsonargparse, which is returned as it is.

    Returns:
        A spelling of jsonargparse.

    Raises:
        ConfigError: The kind is unknown, or has no such setting.
    """
    match gate:
        case str() if "." not in gate and gate not in _class_names():
            return {"class_path": _class_path(gate)}
        case {"kind": kind, **settings}:
            path = _class_path(kind)
            if unknown := [str(name) for name in settings if not _accepts(GATES[kind], str(name))]:
                accepted = ", ".join(field.name for field in fields(GATES[kind]))
                raise ConfigError(
                    f"{GATE}: {kind!r} has no setting {', '.join(unknown)}; accepted: {accepted}"
                )
            return {"class_path": path, "init_args": settings}
        case {"class_path": _} | {"init_args": _}:
            return gate
        case dict():
            return {"init_args": gate}
    return gate


def _translate_model(model: dict[str, Any]) -> dict[str, Any]:
    """Translate a `model` section: expand its gate, and move settings in deprecated places there."""
    model = copy.deepcopy(model)
    adapter = model.get("adapter", {})
    if not isinstance(adapter, dict):  # the path of a file
        return model
    gate = expand_gate(adapter.get("gate")) or {}
    moved = dict(_pop_moved_settings(model))
    if moved:
        gate = {"class_path": gate} if isinstance(gate, str) else gate
        config = _config_class(gate)
        accepted = {name: value for name, value in moved.items() if config is None or _accepts(config, name)}
        gate = {**gate, "init_args": accepted | gate.get("init_args", {})}
    if gate:
        model["adapter"] = {**adapter, "gate": gate}
    return model


def _pop_moved_settings(model: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for old, name in MOVED_SETTINGS.items():
        *sections, key = old.split(".")[1:]
        section = model
        for part in sections:
            section = section.get(part, {})
        if isinstance(section, dict) and key in section:
            announce_deprecation(old, f"{GATE}.{name}")
            yield name, section.pop(key)


def _load_settings(text: str, path: str = "") -> Any:
    check_document(text, str(path))
    settings = get_loader("yaml")(text)
    if path:
        if isinstance(settings, str):  # jsonargparse takes a mapping of empty sections for a text
            settings = yaml.safe_load(text)
        settings = _checked_sections(settings, str(path))
    return translate_settings(settings)


def _checked_sections(config: Any, name: str) -> dict[str, Any]:
    """Return a config without its empty sections, which may hold nothing but comments.

    Raises:
        ParseError: The config or one of its sections is no mapping; jsonargparse would fail later, or never.
    """
    if not isinstance(config, dict):
        kind = "is empty" if config in (None, "") else f"holds {config!r:.60}"
        raise ParseError(f"--config: {name} {kind}; accepted: a mapping of settings, such as 'trainer: …'")
    for path, section in _sections(config):
        if section is not None and not isinstance(section, dict | str):  # a text is the name of a file
            raise ParseError(f"{name}: {path}: {section!r:.60}; accepted: a mapping of settings")
    return {key: value for key, value in config.items() if value is not None or key not in _SECTIONS}


def _sections(config: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key in _SECTIONS & config.keys():
        yield key, config[key]
    model = config.get("model")
    for key in ("backbone", "adapter", "optimizer"):
        if isinstance(model, dict) and key in model:
            yield f"model.{key}", model[key]


class _Dumper(yaml.SafeDumper):
    """Writes an enum as its value."""


_Dumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))


def _dump_settings(settings: Any) -> str:
    """Write YAML with the kind of gate in place of its class; a user's own class stays importable."""
    match settings:
        case {"model": {"adapter": {"gate": dict(gate)}}} if (config := _config_class(gate)) and (
            config.__module__.startswith(f"{gates.__name__}.")
        ):
            settings = copy.deepcopy(settings)
            settings["model"]["adapter"]["gate"] = {"kind": config.kind, **gate.get("init_args", {})}
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def _class_names() -> list[str]:
    return [config.__name__ for config in GATES.values()]


def _class_path(kind: Any) -> str:
    if kind not in GATES:
        raise ConfigError(unknown_value(GATE, kind, GATES))
    return f"{GATES[kind].__module__}.{GATES[kind].__qualname__}"


def _config_class(gate: Any) -> type[GateConfig] | None:
    """The registered class that a gate's `class_path` names; None for any other, and without one."""
    path = gate if isinstance(gate, str) else gate.get("class_path", "") if isinstance(gate, dict) else ""
    package, _, name = str(path).rpartition(".")
    for config in GATES.values():
        # A package above the class's module may export the class, as gatera_lightning does.
        if name == config.__name__ and f"{config.__module__}.".startswith(f"{package}." if package else ""):
            return config
    return None


def _accepts(config: type[GateConfig], setting: str) -> bool:
    return setting in {field.name for field in fields(config)}


set_parsing_settings(docstring_parse_attribute_docstrings=True, subclasses_enabled=[GateConfig])
set_loader(_PARSER_MODE, _load_settings, (yaml.YAMLError,))
set_dumper(_PARSER_MODE, _dump_settings)
