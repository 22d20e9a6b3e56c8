"""Names in the Trainer's settings; Lightning would refuse them later, without the closest accepted name."""

from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from gatera_lightning.errors import unknown_value


def name_problems(trainer: Any) -> list[str]:
    """Reject unknown names of strategies, accelerators and profilers.

    Args:
        trainer: The ``trainer`` section; values that are no text are not looked at.
    """
    accepted = {
        "strategy": ["auto", *sorted(StrategyRegistry.available_strategies())],
        "accelerator": ["auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators())],
        "profiler": ["simple", "advanced", "pytorch", "xla"],
    }
    values = {name: getattr(trainer, name, None) for name in accepted}
    return [
        unknown_value(f"trainer.{name}", value, accepted[name])
        for name, value in values.items()
        if isinstance(value, str) and value not in accepted[name]
    ]
