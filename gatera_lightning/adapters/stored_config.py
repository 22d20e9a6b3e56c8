"""Read ``adapter_config.json`` in every format that this package has written, and in PEFT's.

Formats 1 to 3 have a schema of this package's own. Format 4 is PEFT's schema with a record beside it.
"""

import hashlib
import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.peft_methods import (
    PEFT_METHODS,
    config_of_peft_method,
    tensor_name_of_peft_method,
)
from gatera_lightning.adapters.peft_schema import (
    PEFT_TYPE,
    RECORD,
    from_peft,
    from_peft_tensor,
    settings_digest,
)
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.errors import AdapterFileError, ConfigError, near_miss, unknown_value

CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 4
"""Version of ``adapter_config.json``. Also read: 1, with flat names for the gate's settings, 2 and 3, in an
older schema. 1 and 2 have no digest of the weights file, and fingerprints of version 1."""

_TEXT, _TEXT_OR_NULL, _TABLE = (str,), (str, type(None)), (dict,)
_ORIGIN: dict[str, tuple[type, ...]] = {
    "id": _TEXT_OR_NULL,
    "revision": _TEXT_OR_NULL,
    "fingerprint": _TEXT,
    "attn_implementation": _TEXT_OR_NULL,
}
_OLD_KEYS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "adapter": _TABLE,
    "adapter_sha256": _TEXT,
    "backbone": _TABLE,
    "weights_sha256": _TEXT,
    "template": _TEXT,
}
_RECORD_KEYS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "fingerprint": _TEXT_OR_NULL,
    "fingerprint_float16": _TEXT_OR_NULL,
    "attn_implementation": _TEXT_OR_NULL,
    "quantization": _TEXT,
    "adapter_sha256": _TEXT,
    "settings_sha256": _TEXT,
    "weights_sha256": _TEXT,
    "template": _TEXT,
}
_NAMES = {str: "a text", dict: "a table", int: "an integer", type(None): "null"}


@dataclass(frozen=True)
class StoredAdapter:
    """What ``adapter_config.json`` says."""

    config: AdapterConfig
    """The adapter's settings."""

    origin: dict[str, Any]
    """The backbone: ``id``, ``revision``, ``fingerprint``, ``attn_implementation``, ``quantization``, and the
    ``adapter_sha256`` of a trained adapter that was a part of it."""

    weights_sha256: str | None
    """Digest of the weights file; None in formats without one."""

    template: str | None
    """The prompt template of the training data, if it is known."""

    parameter_name: Callable[[str], str]
    """Name of a tensor in the file -> name of the parameter in the adapted model."""

    is_peft_method: bool = False
    """Whether the folder is one of PEFT's own methods, which store no fingerprint and no digests."""


def read_stored_config(folder: str | Path) -> StoredAdapter:
    """Read ``adapter_config.json``.

    Raises:
        AdapterFileError: If the file is missing, malformed, changed, or from a newer version.
    """
    path = Path(folder) / CONFIG_FILE
    description = _read_json(Path(folder))
    try:
        if "peft_type" in description:
            return _read_peft(description)
        if "format_version" in description:
            return _read_old(description)
    except ConfigError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    raise AdapterFileError(f"{path}: malformed, not an adapter's description: {str(description)[:60]!r}")


def _adapter_inside(folder: Path) -> str:
    """Return a hint if the folder of a run, of several, or of checkpoints stands for that of an adapter."""
    patterns = ("*", "checkpoints/*", "version_*/checkpoints/*")
    inside = [path for pattern in patterns for path in folder.glob(f"{pattern}/{CONFIG_FILE}")]
    found = inside
    if folder.suffix == ".ckpt" and (beside := folder.with_suffix("") / CONFIG_FILE).is_file():
        found = [beside]  # checkpoints/last.ckpt has checkpoints/last
    newest = max(found, key=lambda path: (path.parent.name == "last", path.stat().st_mtime_ns), default=None)
    return "" if newest is None else f"; did you mean {str(newest.parent)!r}?"


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterFileError(
            f"{folder}: not an adapter folder ({CONFIG_FILE} is missing){_adapter_inside(folder)}"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: malformed, not JSON ({error})") from error
    if not isinstance(description, dict):
        raise AdapterFileError(f"{path}: malformed, not an adapter's description: {str(description)[:60]!r}")
    return description


def _read_old(description: dict[str, Any]) -> StoredAdapter:
    version = _version(description, range(1, 4))
    _check("", description, _OLD_KEYS, required={"adapter", "backbone"})
    origin = description["backbone"]
    _check("backbone.", origin, _ORIGIN, required={"id", "revision", "fingerprint"})
    config = _checked(AdapterConfig.from_dict(description["adapter"]))
    if version >= 3 and description.get("adapter_sha256") != _old_digest(description["adapter"]):
        raise ConfigError(
            "corrupt, or changed after it was saved: the SHA-256 of 'adapter' is not 'adapter_sha256', so "
            "the weights were trained with other settings"
        )
    if version >= 3 and "weights_sha256" not in description:
        raise ConfigError("malformed: weights_sha256 is missing")
    return StoredAdapter(config, origin, description.get("weights_sha256"), _template(description), str)


def _read_peft(description: dict[str, Any]) -> StoredAdapter:
    method = description["peft_type"]
    if method in PEFT_METHODS:
        config, origin = _checked(config_of_peft_method(description)), _origin(description, {})
        return StoredAdapter(config, origin, None, None, tensor_name_of_peft_method(method), True)
    if method != PEFT_TYPE:
        raise ConfigError(f"peft_type: {method!r}; accepted: {', '.join((PEFT_TYPE, *PEFT_METHODS))}")
    record = description.get(RECORD, {})
    if type(record) is dict and record:
        _version(record, (FORMAT_VERSION,), f"{RECORD}.")
        _check(f"{RECORD}.", record, _RECORD_KEYS, required={"settings_sha256", "weights_sha256"})
    config = _checked(from_peft(description))
    if record and record["settings_sha256"] != settings_digest(description):
        raise ConfigError(
            f"corrupt, or changed after it was saved: the SHA-256 of the settings is not "
            f"'{RECORD}.settings_sha256', so the weights were trained with other settings"
        )
    origin = _origin(description, record)
    return StoredAdapter(config, origin, record.get("weights_sha256"), _template(record), from_peft_tensor)


def _checked(config: AdapterConfig) -> AdapterConfig:
    """Return the settings; raise ConfigError if one of them cannot work."""
    if problems := config.problems():
        raise ConfigError(problems)
    return config


def _origin(description: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    origin = {"id": description.get("base_model_name_or_path"), "revision": description.get("revision")}
    names = (
        *("fingerprint", "fingerprint_float16", "attn_implementation", "quantization"),
        "adapter_sha256",
    )
    for key in ("base_model_name_or_path", "revision"):
        _check("", {key: description.get(key)}, {key: _TEXT_OR_NULL}, required=set())
    return origin | {name: record.get(name) for name in names}


def _version(description: Mapping[str, Any], accepted: Any, prefix: str = "") -> int:
    version = description.get("format_version")
    if type(version) is not int or version not in accepted:
        raise ConfigError(
            f"{prefix}format_version {version!r}; this version reads 1 to {FORMAT_VERSION}"
            + (f", and {FORMAT_VERSION} in PEFT's schema" if not prefix else "")
        )
    return version


def _check(
    prefix: str, table: Mapping[str, Any], known: Mapping[str, tuple[type, ...]], required: set[str]
) -> None:
    """Raise ConfigError for a key that is missing, unknown, or of another type."""
    if missing := sorted(required - set(table)):
        raise ConfigError(f"malformed: {prefix}{missing[0]} is missing")
    for key, value in table.items():
        if key not in known:
            raise ConfigError(
                f"malformed: {prefix}{key} is unknown; accepted: {', '.join(known)}{near_miss(key, known)}"
            )
        if type(value) not in known[key]:
            accepted = " or ".join(_NAMES[kind] for kind in known[key])
            raise ConfigError(f"malformed: {prefix}{key}: {reprlib.repr(value)}; accepted: {accepted}")


def _template(table: Mapping[str, Any]) -> str | None:
    template = table.get("template")
    if "template" in table and template not in get_args(Template):
        raise ConfigError(unknown_value("template", template, get_args(Template)))
    return template


def _old_digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
