"""Finds configs by name: the user's own files, and the ones that ship with this package."""

import difflib
import itertools
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from gatera_lightning.cli.deprecation import announce_deprecation
from gatera_lightning.errors import ConfigError

RENAMED_CONFIGS = {
    "decided_gates.yaml": "saturated_gates.yaml",
    "fast_decided.yaml": "fast_saturated.yaml",
}
"""Old file name of a shipped config -> its name now."""


def find_config(name: str) -> str:
    """Return the path of a config.

    Args:
        name: A file, or a shipped config: `quickstart.yaml`, or for an overlay any of `lora.yaml`, `overlays/lora.yaml`
            and `overlays/method/lora.yaml`. A file wins over a shipped config of the same name.

    Raises:
        ConfigError: There is no such config; the message lists the shipped ones.
    """
    if os.path.isfile(name):
        return name
    shipped = _shipped_configs()
    if name in shipped:
        return str(shipped[name])
    new_name = RENAMED_CONFIGS.get(Path(name).name)
    if new_name in shipped and name in (Path(name).name, f"overlays/{Path(name).name}"):
        announce_deprecation(f"the config {name}", new_name)
        return str(shipped[new_name])
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    names = sorted({path.relative_to(_folder()).as_posix() for path in shipped.values()})
    raise ConfigError(
        f"--config: {name!r} is neither a file nor a shipped config{hint}; shipped: {', '.join(names)}"
    )


def with_found_configs(argv: Sequence[str]) -> list[str]:
    """Replace the name of every config in a command line by its path, and move configs before all other flags.

    jsonargparse lets the last of several values win; with configs in front, flags win over configs wherever they are.

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
            configs += ["--config", find_config(next(rest, ""))]
        elif arg.startswith("--config="):
            configs += ["--config", find_config(arg.removeprefix("--config="))]
        else:
            others.append(arg)
    return [*subcommand, *configs, *others]


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
