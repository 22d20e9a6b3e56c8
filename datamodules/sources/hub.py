"""Read rows of datasets on the Hugging Face hub."""

from collections.abc import Iterator
from typing import Any

from gatera_lightning.datamodules.sources.arrow_nulls import without_added_nulls
from gatera_lightning.datamodules.sources.spec import HubDataset
from gatera_lightning.errors import ConfigError, printable


def read_hub_rows(location: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a hub dataset.

    Args:
        location: ``owner/name``, optionally with ``:configuration`` and ``@split``.
        split: The data module's split, which is loaded unless ``location`` names another one.

    Yields:
        Where the row is, for error messages (``owner/name[split], row N``, from 1), and the row.

    Raises:
        ConfigError: The dataset cannot be loaded.
    """
    from datasets import load_dataset

    dataset = HubDataset.parse(location)
    hub_split = dataset.split or split
    try:
        rows = load_dataset(dataset.id, dataset.configuration, split=hub_split)
    except Exception as error:  # the client raises a dozen unrelated types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            printable(f"data.{split}: cannot fetch {location!r} from the hub ({reason}). ")
            + "Write owner/name:configuration to choose a configuration and owner/name@split to choose "
            "another split. Without network access, use local files."
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{dataset.id}[{hub_split}], row {number}", without_added_nulls(row)
