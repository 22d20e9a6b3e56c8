"""Token-gated high-rank fine-tuning of frozen language models: GateRA, HiRA, DoRA and LoRA.

Public names are imported on first use: ``import gatera_lightning`` loads neither Lightning nor datasets.
If PEFT is already imported, this registers its method GATERA; else ``import gatera_lightning.peft`` does.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from gatera_lightning.compatibility import moved_modules

moved_modules.install()

if TYPE_CHECKING:
    from gatera_lightning.adapters.config import AdapterConfig as AdapterConfig
    from gatera_lightning.adapters.gate_recording import record_gates as record_gates
    from gatera_lightning.adapters.gates import Gate as Gate
    from gatera_lightning.adapters.gates import GateConfig as GateConfig
    from gatera_lightning.adapters.gates import HardGateConfig as HardGateConfig
    from gatera_lightning.adapters.gates import NoGateConfig as NoGateConfig
    from gatera_lightning.adapters.gates import PositionGateConfig as PositionGateConfig
    from gatera_lightning.adapters.gates import StaticGateConfig as StaticGateConfig
    from gatera_lightning.adapters.gates import ThresholdGateConfig as ThresholdGateConfig
    from gatera_lightning.adapters.gates import TokenGateConfig as TokenGateConfig
    from gatera_lightning.adapters.gates import register_gate as register_gate
    from gatera_lightning.adapters.inference import prepared_for_inference as prepared_for_inference
    from gatera_lightning.adapters.injection import InjectionReport as InjectionReport
    from gatera_lightning.adapters.injection import inject_adapters as inject_adapters
    from gatera_lightning.adapters.loading import load_adapter as load_adapter
    from gatera_lightning.adapters.lookup import adapter_parameters as adapter_parameters
    from gatera_lightning.adapters.merging import merge_adapter as merge_adapter
    from gatera_lightning.adapters.position_mask import position_mask as position_mask
    from gatera_lightning.adapters.serialization import save_adapter as save_adapter
    from gatera_lightning.adapters.updates import Update as Update
    from gatera_lightning.adapters.updates import register_update as register_update
    from gatera_lightning.backbone import BackboneConfig as BackboneConfig
    from gatera_lightning.errors import AdapterFileError as AdapterFileError
    from gatera_lightning.errors import CheckpointError as CheckpointError
    from gatera_lightning.errors import ConfigError as ConfigError
    from gatera_lightning.errors import NonFiniteLossError as NonFiniteLossError
    from gatera_lightning.gate_analysis.capture import capture_gates as capture_gates
    from gatera_lightning.gate_analysis.statistics import GateStatistics as GateStatistics
    from gatera_lightning.generation.decoding import DecodingConfig as DecodingConfig
    from gatera_lightning.objectives import Objective as Objective
    from gatera_lightning.objectives import Term as Term
    from gatera_lightning.objectives import training_loss as training_loss
    from gatera_lightning.peft import GateRAConfig as GateRAConfig
    from gatera_lightning.training.module import GateRAModule as GateRAModule
    from gatera_lightning.training.optimizer import OptimizerConfig as OptimizerConfig

_MODULES = {
    "AdapterConfig": "adapters.config",
    "AdapterFileError": "errors",
    "BackboneConfig": "backbone",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DecodingConfig": "generation.decoding",
    "Gate": "adapters.gates",
    "GateConfig": "adapters.gates",
    "GateRAConfig": "peft",
    "GateRAModule": "training.module",
    "GateStatistics": "gate_analysis.statistics",
    "HardGateConfig": "adapters.gates",
    "InjectionReport": "adapters.injection",
    "NoGateConfig": "adapters.gates",
    "NonFiniteLossError": "errors",
    "Objective": "objectives",
    "OptimizerConfig": "training.optimizer",
    "PositionGateConfig": "adapters.gates",
    "StaticGateConfig": "adapters.gates",
    "Term": "objectives",
    "ThresholdGateConfig": "adapters.gates",
    "TokenGateConfig": "adapters.gates",
    "Update": "adapters.updates",
    "adapter_parameters": "adapters.lookup",
    "capture_gates": "gate_analysis.capture",
    "inject_adapters": "adapters.injection",
    "load_adapter": "adapters.loading",
    "merge_adapter": "adapters.merging",
    "position_mask": "adapters.position_mask",
    "prepared_for_inference": "adapters.inference",
    "record_gates": "adapters.gate_recording",
    "register_gate": "adapters.gates",
    "register_update": "adapters.updates",
    "save_adapter": "adapters.serialization",
    "training_loss": "objectives",
}
"""Public name -> the module below this package that defines it."""

__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gatera-lightning")
    if name not in _MODULES:
        raise AttributeError(
            f"module 'gatera_lightning' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # found by a plain lookup next time
    return value


def __dir__() -> list[str]:
    return __all__


if hasattr(sys.modules.get("peft"), "PeftModel"):  # PEFT is slow to import, so it is not imported for this
    importlib.import_module(f"{__name__}.peft")
