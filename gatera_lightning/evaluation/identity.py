"""``evaluation.json``: what the predictions in a folder were computed from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatera_lightning.errors import ConfigError

IDENTITY_FILE = "evaluation.json"
FORMAT_VERSION = 2
"""Increase it when records or the parsing of answers change, so that old predictions are not reused."""


def check_identity(
    folder: Path,
    stored: Mapping[str, Any] | None,
    current: Mapping[str, Any],
    setting: str = "evaluation.folder",
) -> None:
    """Check that the predictions in a folder belong to the current evaluation.

    Args:
        folder: The evaluation folder.
        stored: Content of its ``evaluation.json``; None if there is none.
        current: Identity of the current evaluation.
        setting: What names the folder, for the message.

    Raises:
        ConfigError: There is no stored identity, or it differs; the message lists every difference.
    """
    if stored is None:
        raise ConfigError(
            f"{setting}: {folder} holds predictions, but no {IDENTITY_FILE} that says how they were "
            "computed; expected an empty folder"
        )
    different = [name for name in sorted({*stored, *current}) if stored.get(name) != current.get(name)]
    if different:
        details = "; ".join(
            f"{name} was {_shorten(stored.get(name))} and is {_shorten(current.get(name))}"
            for name in different
        )
        raise ConfigError(
            f"{setting}: {folder} holds predictions of another evaluation: {details}. "
            f"Choose another {setting}"
        )


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
