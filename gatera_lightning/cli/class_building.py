"""Build the classes that a config names; one that cannot be built is one problem, with its setting."""

import re
from collections.abc import Iterator
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from gatera_lightning.errors import ConfigError

# What jsonargparse says about a class among several types that a setting may have.
_OF_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)", re.DOTALL)
_OF_TYPES = re.compile(r"Does not validate against any of the Union subtypes.*?Errors:\s*-\s*(.*)", re.DOTALL)
_NEXT_TYPE = re.compile(r"\n\s*-\s|\n\s*Given value")


def build_classes(parser: LightningArgumentParser, config: Namespace) -> Namespace:
    """Build every object that a config describes.

    Args:
        parser: The parser that parsed the config.
        config: The whole config, with the settings of its subcommand in a section of that name.

    Returns:
        The config with objects for class paths.

    Raises:
        ConfigError: A class cannot be built; the message has its setting, and what the class said.
    """
    try:
        return parser.instantiate_classes(config)
    except ConfigError:
        raise
    except Exception as error:  # the class may be anybody's
        raise ConfigError(_problem(config, error)) from error


def _problem(config: Namespace, error: Exception) -> str:
    paths = dict(_class_paths("", config[config.subcommand].as_dict()))
    text = str(error)
    if found := _OF_CLASS.search(text):
        path, reason = found[1], found[2]
    else:
        path = _class_being_built(error, set(paths.values()))
        reason = alternatives[1] if (alternatives := _OF_TYPES.search(text)) else text
    reason = " ".join(_NEXT_TYPE.split(reason)[0].split())[:300] or type(error).__name__
    setting = next((name for name, value in paths.items() if value == path), "")
    if not setting:
        return f"the classes of the configuration cannot be built: {reason}"
    accepted = "" if "accepted" in reason else "; accepted: settings with which it can be built"
    return f"{setting}: {path} cannot be built: {reason}{accepted}"


def _class_paths(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every setting that holds a class, and its import path; those inside others come first."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    for key, entry in value.items():
        nested = name if key in ("class_path", "init_args") else f"{name}.{key}".lstrip(".")
        yield from _class_paths(nested, entry)
    if isinstance(value.get("class_path"), str):
        yield name, value["class_path"]


def _class_being_built(error: Exception, paths: set[str]) -> str:
    """The import path of the class whose constructor raised an exception; empty if it is none of them."""
    names = {path.rpartition(".")[2]: path for path in paths}
    seen: BaseException | None = error
    while seen is not None:
        traceback = seen.__traceback__
        while traceback is not None:
            built = type(traceback.tb_frame.f_locals.get("self")).__name__
            if traceback.tb_frame.f_code.co_name == "__init__" and built in names:
                return names[built]
            traceback = traceback.tb_next
        seen = seen.__cause__ or seen.__context__
    return ""
