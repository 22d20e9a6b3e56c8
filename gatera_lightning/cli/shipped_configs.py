"""Finds configs by name: the user's own files, and the ones that ship with this package."""

import itertools
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from gatera_lightning.cli.deprecation import announce_deprecation
from gatera_lightning.errors import ConfigError, near_miss

RENAMED_CONFIGS = {
    "decided_gates.yaml": ("saturated_gates.yaml",),
    "fast_decided.yaml": ("fast_saturated.yaml",),
    "llama2_commonsense.yaml": ("llama_commonsense.yaml", "llama2_7b.yaml"),
    "qwen_commonsense.yaml": ("llama_commonsense.yaml", "qwen3_8b.yaml"),
}
"""Old file name of a shipped config -> the configs that replace it, in order."""


def find_configs(name: str) -> list[str]:
    """Return the paths of a config; several if a recipe with an overlay has replaced it.

    Args:
        name: As for :func:`find_config`, or the name that a shipped config had before.

    Raises:
        ConfigError: There is no such config; the message lists the shipped ones.
    """
    base = Path(name).name
    if os.path.isfile(name) or base not in RENAMED_CONFIGS or name not in (base, f"overlays/{base}"):
        return [find_config(name)]
    replacements = RENAMED_CONFIGS[base]
    announce_deprecation(f"the config {name}", " --config ".join(replacements))
    return [find_config(replacement) for replacement in replacements]


def find_config(name: str) -> str:
    """Return the path of a config.

    Args:
        name: A file, or a shipped config: `quickstart.yaml`, or for an overlay any of `lora.yaml`,
            `overlays/lora.yaml` and `overlays/method/lora.yaml`. A file wins over a shipped config.

    Raises:
        ConfigError: There is no such config; the message lists the shipped ones.
    """
    if os.path.isfile(name):
        _check_text(name)
        return name
    shipped = _shipped_configs()
    if name in shipped:
        return str(shipped[name])
    if os.path.exists(name):
        kind = "a folder" if os.path.isdir(name) else "no regular file"
        raise ConfigError(
            f"--config: {name!r} is {kind}; accepted: a YAML file, or the name of a shipped config"
        )
    names = sorted({path.relative_to(_folder()).as_posix() for path in shipped.values()})
    raise ConfigError(
        f"--config: {name!r} is neither a file nor a shipped config{near_miss(name, shipped)}; "
        f"shipped: {', '.join(names)}"
    )


def with_found_configs(argv: Sequence[str]) -> list[str]:
    """Replace config names in a command line by paths, and move configs before all other flags.

    jsonargparse lets the last of several values win; with configs in front, flags always win over configs.

    Args:
        argv: A subcommand and its arguments; configs as `--config NAME`, `--config=NAME` or `-c NAME`.

    Raises:
        ConfigError: A config does not exist.
    """
    subcommand = list(itertools.takewhile(lambda arg: not arg.startswith("-"), argv))
    configs, others = [], []
    rest = iter(argv[len(subcommand) :])
    for arg in rest:
        if arg in ("--config", "-c"):
            configs += _config_flags(next(rest, ""))
        elif arg.startswith("--config="):
            configs += _config_flags(arg.removeprefix("--config="))
        else:
            others.append(arg)
    return [*subcommand, *configs, *others]


def _config_flags(name: str) -> list[str]:
    return [arg for path in find_configs(name) for arg in ("--config", path)]


def _check_text(path: str) -> None:
    """Refuse a config that cannot be read as text."""
    try:
        content = Path(path).read_bytes()
        content.decode()
    except OSError as error:
        raise ConfigError(f"--config: {path!r}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"--config: {path!r}, line {line}: the byte 0x{content[error.start]:02x} is not UTF-8; "
            "accepted: a YAML file in UTF-8"
        ) from error


def _folder() -> Path:
    return Path(str(resources.files("gatera_lightning.cli_configs")))


def _shipped_configs() -> dict[str, Path]:
    """Every name by which a shipped config is found -> its file."""
    found = {}
    for path in sorted(_folder().rglob("*.yaml")):
        name = path.relative_to(_folder()).as_posix()
        found[name] = path
        if name.startswith("overlays/"):
            found[path.name] = found[f"overlays/{path.name}"] = path
    return found
