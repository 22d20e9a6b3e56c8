"""An adapter on the command line: its folder, the folder of the run that trained it, or its id on the hub."""

import re
from pathlib import Path

from gatera_lightning.adapters.serialization import WEIGHTS_FILE
from gatera_lightning.adapters.stored_config import CONFIG_FILE
from gatera_lightning.checkpointing.integrity import CHECKPOINT_FOLDER
from gatera_lightning.errors import ConfigError

ACCEPTED = "an adapter folder, a run's folder, whose last adapter is used, or an adapter's id on the hub"
"""What an argument for an adapter may be, for ``--help`` and error messages."""

# Neither a path such as ./a or ~/a, nor more than one slash.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def adapter_folder(given: str, argument: str = "--adapter") -> str:
    """Find the adapter folder of an argument.

    Args:
        given: An adapter folder; a run's folder, or its folder of checkpoints, stands for the adapter beside
            ``last.ckpt``, or for the only one in it; ``owner/name`` is fetched from the hub if it is no path
            here.
        argument: The argument's name, for error messages.

    Returns:
        The adapter folder; what is given if there is none, so that reading it says what is missing.

    Raises:
        ConfigError: The argument is empty or a whole model, the run has several adapters and none is the
            last, or the hub's adapter cannot be fetched.
    """
    if not given.strip():  # an unset variable of the shell, and not the working folder
        raise ConfigError(f"{argument}: {given!r}; accepted: {ACCEPTED}")
    folder = Path(given)
    if (folder / CONFIG_FILE).exists():
        return given
    if not folder.exists() and _HUB_ID.fullmatch(given) and not folder.parent.exists():
        return _from_hub(given, argument)
    checkpoints = folder / CHECKPOINT_FOLDER if (folder / CHECKPOINT_FOLDER).is_dir() else folder
    found = sorted(file.parent for file in checkpoints.glob(f"*/{CONFIG_FILE}"))
    last = [one for one in found if one.name == "last"]
    if not found and (folder / "config.json").is_file():
        raise ConfigError(
            f"{argument}: {given} holds a whole model, without an adapter; accepted: {ACCEPTED}. A whole "
            "model is a --backbone for chat, generate and harness, and other engines serve it"
        )
    if not found:
        return given
    if not last and len(found) > 1:
        names = ", ".join(map(str, found[:10]))
        raise ConfigError(f"{argument}: {given} holds {len(found)} adapters; accepted: one of {names}")
    return str((last or found)[0])


def _from_hub(name: str, argument: str) -> str:
    """Download an adapter's two files, or find them in the cache of the hub's client."""
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # the client raises a dozen unrelated types
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ConfigError(
            f"{argument}: {name!r} is no folder here and cannot be fetched from the hub "
            f"({type(error).__name__}: {reason}); accepted: {ACCEPTED}"
        ) from error
