"""What the model card of an adapter says about the run that trained it."""

from typing import Any

import lightning as L

_DATA = ("data_dir", "train_on", "batch_size", "max_length", "packing")


def run_details(trainer: L.Trainer) -> dict[str, dict[str, Any]]:
    """Return the data, the settings and the last metrics of a run, by the title of their table.

    Args:
        trainer: The trainer of the run.
    """
    module: Any = trainer.lightning_module
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    sources = getattr(data, "sources", {"train": None})  # a data module of one's own may have none
    values = {"train": sources["train"]} | {name: getattr(data, name, None) for name in _DATA}
    optimizer = vars(module.optimizer) if hasattr(module, "optimizer") else {}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    return {
        "Training data": {} if data is None else {"task": type(data).__name__} | values,
        "Training": {"optimizer steps": trainer.global_step} | optimizer,
        "Metrics": dict(sorted(metrics.items())),
    }
