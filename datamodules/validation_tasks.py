"""Which task each validation example belongs to."""

from gatera_lightning.datamodules.base import SupervisedDataModule


def validation_tasks(data: object) -> dict[int, str]:
    """Return the task of each example of a data module's validation split; empty without several tasks."""
    if not isinstance(data, SupervisedDataModule) or "validation" not in data.tables:
        return {}
    table = data.tables["validation"]
    tasks = dict(zip(table["example"], table["task"], strict=True))
    return tasks if len(set(tasks.values())) > 1 else {}
