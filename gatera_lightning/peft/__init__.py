"""GateRA as a method of Hugging Face PEFT, which loads, trains and combines its adapters by PEFT's own calls.

Importing this package registers the method in this process. ``import gatera_lightning`` does so as well if
PEFT was imported before it.
"""

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise ImportError(
        "gatera_lightning.peft needs the package peft: pip install 'gatera-lightning[peft]'"
    ) from error

from gatera_lightning.peft.config import GateRAConfig
from gatera_lightning.peft.gate_entropy_trainer import GateEntropyMixin
from gatera_lightning.peft.layer import GateRALinear
from gatera_lightning.peft.registration import register
from gatera_lightning.peft.tuner import GateRAModel

__all__ = ["GateEntropyMixin", "GateRAConfig", "GateRALinear", "GateRAModel", "register"]

register()
