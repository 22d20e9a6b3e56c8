"""Read the small JSON files of an evaluation folder."""

import json
from pathlib import Path
from typing import Any

from gatera_lightning.errors import ConfigError, printable


def read_object(file: Path) -> dict[str, Any] | None:
    """Read a JSON object.

    Args:
        file: A file of an evaluation folder.

    Returns:
        The object; None if there is no such file.

    Raises:
        ConfigError: The file cannot be read, or is no JSON object; it may be cut short.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(printable(f"{file}: cannot be read ({error.strerror})")) from None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError also for bytes that are not UTF-8
        raise ConfigError(printable(f"{file}: is not JSON ({error}); is it cut short?")) from None
    if not isinstance(found, dict):
        raise ConfigError(printable(f"{file}: is no JSON object, but {type(found).__name__}"))
    return found
