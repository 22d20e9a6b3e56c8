"""Registers GateRA in PEFT's tables of methods.

PEFT has no public call for a method outside of its source tree: ``register_peft_method`` refuses a name that
is not in ``PeftType``. Its tables take any key that compares equal to the name and has a ``value``.
"""

from typing import Any

from peft import mapping

from gatera_lightning.peft.config import GateRAConfig, GateRAType
from gatera_lightning.peft.tuner import GateRAModel


def register() -> None:
    """Let PEFT and Transformers find the method by its name ``GATERA``; calling it again changes nothing."""
    key: Any = GateRAType.GATERA  # the tables are annotated with PeftType
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = GateRAConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = GateRAModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = GateRAModel.prefix
