"""An adapter on the command line: its folder, or the folder of the run that trained it."""

from pathlib import Path

from gatera_lightning.adapters.stored_config import CONFIG_FILE
from gatera_lightning.checkpointing.integrity import CHECKPOINT_FOLDER
from gatera_lightning.errors import ConfigError


def adapter_folder(given: str) -> str:
    """Find the adapter folder of an argument.

    Args:
        given: An adapter folder; a run's folder, or its folder of checkpoints, stands for the adapter beside
            ``last.ckpt``; or the only one in it.

    Returns:
        The adapter folder; what is given if it is no run's folder.

    Raises:
        ConfigError: The run has several adapters and none is the last.
    """
    folder = Path(given)
    if (folder / CONFIG_FILE).exists() or not given:
        return given
    checkpoints = folder / CHECKPOINT_FOLDER if (folder / CHECKPOINT_FOLDER).is_dir() else folder
    found = sorted(file.parent for file in checkpoints.glob(f"*/{CONFIG_FILE}"))
    last = [one for one in found if one.name == "last"]
    if not found:
        return given
    if not last and len(found) > 1:
        names = ", ".join(map(str, found[:10]))
        raise ConfigError(f"--adapter: {given} holds {len(found)} adapters; accepted: one of {names}")
    return str((last or found)[0])
