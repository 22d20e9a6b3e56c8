"""GateRA and its relatives for frozen language models: token-gated high-rank fine-tuning under PyTorch Lightning."""

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gate_recording import record_gates
from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.adapters.injection import InjectionReport, adapter_parameters, inject_adapters
from gatera_lightning.adapters.merging import merge_adapter
from gatera_lightning.adapters.serialization import AdapterFileError, load_adapter, save_adapter
from gatera_lightning.backbone.loading import BackboneConfig
from gatera_lightning.errors import CheckpointError, ConfigError, NonFiniteLossError
from gatera_lightning.gate_analysis.capture import capture_gates
from gatera_lightning.gate_analysis.statistics import GateStatistics
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.training.module import GateRAModule
from gatera_lightning.training.optimizer import OptimizerConfig

__all__ = [
    "AdapterConfig",
    "AdapterFileError",
    "BackboneConfig",
    "CheckpointError",
    "ConfigError",
    "DecodingConfig",
    "GateRAModule",
    "GateStatistics",
    "InjectionReport",
    "NonFiniteLossError",
    "OptimizerConfig",
    "adapter_parameters",
    "capture_gates",
    "inject_adapters",
    "load_adapter",
    "merge_adapter",
    "prepared_for_inference",
    "record_gates",
    "save_adapter",
]
