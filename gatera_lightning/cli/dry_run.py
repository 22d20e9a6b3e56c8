"""The processes of a run that has not begun, for verbs that say what it would do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedTrainer:
    """What a data module asks of a Trainer, for a run with any number of processes that are not here."""

    world_size: int
    accumulate_grad_batches: int
    limit_train_batches: float = 1.0
    global_rank: int = 0
    is_global_zero: bool = False  # whose log lines stand among the figures


def processes_of(devices: int | str | list[int], nodes: int) -> tuple[int, str]:
    """How many processes would train, and a remark where only the machine that trains could tell."""
    if isinstance(devices, str) and "," in devices:  # as Lightning reads "0,1" and "0,"
        return len([device for device in devices.split(",") if device.strip()]) * nodes, ""
    if isinstance(devices, list):
        return len(devices) * nodes, ""
    if str(devices).isdecimal() and int(devices) > 0:  # a flag's 4 comes as text
        return int(devices) * nodes, ""
    return 1, f" (assumed: trainer.devices is {devices})"
