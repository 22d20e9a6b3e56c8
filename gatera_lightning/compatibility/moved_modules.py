"""Import modules under the names they had before version 0.2.

The names stand in users' scripts, in ``class_path`` entries of YAML files and in pickled checkpoints. An old
name imports a stand-in that looks its attributes up in the modules that took over, with a warning that names
them. The old names go away in version 0.3.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOT = "gatera_lightning"

MOVED: dict[str, tuple[str, ...]] = {
    "agreement": ("distributed.consistency", "distributed.launch"),
    "candidates": ("evaluation.candidate_scoring", "backbone.probes"),
    "checkpoint_files": (
        "checkpointing.checkpoint_io",
        "checkpointing.atomic_files",
        "checkpointing.sharded_format",
        "checkpointing.integrity",
    ),
    "commands": ("cli.commands",),
    "compiled_layers": ("backbone.compilation",),
    "costs": ("cost_model.step_costs", "cost_model.live_bytes"),
    "fused_cross_entropy": ("objectives.linear_cross_entropy", "backbone.probes"),
    "gguf_reading": ("backbone.gguf",),
    "inspection": ("gate_analysis",),
    "losses": ("objectives.next_token", "objectives.gate_entropy", "datamodules.batch"),
    "masked_text": ("datamodules.loss_mask_view",),
    "module": ("training.module",),
    "optimization": ("training.optimizer",),
    "parallel": ("distributed.sharding",),
    "recomputation": ("backbone.recomputation",),
    "resuming": ("checkpointing.data_position",),
    "sharded_loading": ("distributed.sharded_loading",),
    "streaming": ("generation.streaming",),
    "adapters.dora": ("adapters.updates.dora",),
    "adapters.files": ("adapters.serialization", "adapters.loading", "adapters.identity"),
    "adapters.hira": ("adapters.updates.hira",),
    "adapters.inject": ("adapters.injection", "adapters.lookup"),
    "adapters.linear": ("adapters.layer", "adapters.updates"),
    "adapters.lora": ("adapters.updates.lora",),
    "adapters.merge": ("adapters.merging",),
    "adapters.ops": ("adapters.kernels.hadamard", "adapters.kernels.gate_logit"),
    "adapters.partitioned": ("adapters.kernels.saturated_gates",),
    "adapters.prepared": ("adapters.inference",),
    "adapters.recording": ("adapters.gate_recording",),
    "commands.chat": ("cli.commands.chat", "cli.commands.generate"),
    "commands.compare": ("cli.commands.compare",),
    "commands.demo": ("cli.commands.demo",),
    "commands.export": ("cli.commands.export",),
    "commands.gates": ("cli.commands.gates",),
    "commands.plan": ("cli.commands.estimate", "cost_model.device_memory"),
    "commands.preview": ("cli.commands.preview",),
    "commands.speaker": ("cli.terminal_model",),
    "commands.submit": ("cli.commands.submit", "cli.slurm_job"),
    "datamodules.commonsense": ("datamodules.tasks.commonsense",),
    "datamodules.conversations": (
        "datamodules.prompts.conversations",
        "datamodules.prompts.conversation_prompts",
    ),
    "datamodules.convai2": ("datamodules.tasks.convai2_files",),
    "datamodules.dialogue": ("datamodules.tasks.dialogue",),
    "datamodules.dialogue_prompts": ("datamodules.prompts.dialogue_prompts",),
    "datamodules.family": ("datamodules.tasks.base",),
    "datamodules.batches": ("datamodules.batching.datasets",),
    "datamodules.held_out": ("datamodules.batching.holdout",),
    "datamodules.leakage": ("datamodules.overlap",),
    "datamodules.loader": ("datamodules.batching.loader", "datamodules.batching.workers"),
    "datamodules.mixture": ("datamodules.batching.mixture",),
    "datamodules.packing": ("datamodules.batching.packing",),
    "datamodules.plan": ("datamodules.batching.batch_schedule",),
    "datamodules.statistics": ("datamodules.batching.statistics",),
    "datamodules.tables": ("datamodules.tokenization.cache",),
    "datamodules.math": ("datamodules.tasks.math",),
    "datamodules.own_data": ("datamodules.tasks.instruction",),
    "datamodules.personas": ("datamodules.tasks.personas",),
    "datamodules.tokens": (
        "datamodules.tokenization.tokenize",
        "datamodules.example",
        "datamodules.batch",
        "datamodules.batching.collate",
    ),
    "evaluation.answers": ("datamodules.answers.options",),
    "evaluation.math_answers": ("datamodules.answers.numbers",),
    "evaluation.paired": ("evaluation.paired_tests",),
    "evaluation.ranking": ("evaluation.likelihood_ranking",),
    "evaluation.results_report": ("evaluation.results_table",),
    "inspection.capture": ("gate_analysis.capture",),
    "inspection.coloured_text": ("gate_analysis.plots.colored_text",),
    "inspection.gate_shares": ("gate_analysis.plots.gate_shares", "gate_analysis.history"),
    "inspection.heatmap": ("gate_analysis.plots.heatmap",),
    "inspection.reading": ("gate_analysis.probing",),
    "inspection.report": ("gate_analysis.report",),
    "inspection.statistics": ("gate_analysis.statistics",),
    "inspection.token_text": ("gate_analysis.token_labels",),
}
"""Old module -> the modules that hold its content now, both below ``gatera_lightning``."""

RENAMED: dict[str, str] = {
    "backbone.device_here": "backbone.loading.default_device",
    "backbone.evaluating": "backbone.probes.eval_mode",
    "backbone.keeps_packed_rows_apart": "backbone.probes.isolates_packed_sequences",
    "backbone.ready_for_training": "backbone.loading.prepare_for_training",
    "checkpoint_files.WholeCheckpointIO": "checkpointing.checkpoint_io.AtomicCheckpointIO",
    "checkpoint_files.newest_sound_checkpoint": "checkpointing.integrity.newest_valid_checkpoint",
    "cli.CALLBACKS": "cli.run_callbacks.RUN_CALLBACKS",
    "cli.GateRACLI": "cli.lightning_cli.GateRACLI",
    "cli.PROG": "cli.PROGRAM",
    "cli.find_config": "cli.shipped_configs.find_config",
    "cli.with_found_configs": "cli.shipped_configs.with_found_configs",
    "commands.plan.plan": "cli.commands.estimate.estimate",
    "datamodules.family.TaskFamily": "datamodules.TaskDataModule",
    "datamodules.own_data.OwnDataModule": "datamodules.InstructionDataModule",
    "inspection.reading.read_gates": "gate_analysis.probing.profile_gates",
    "losses.next_token_labels": "objectives.next_token.shift_labels",
    "losses.next_token_mask": "objectives.next_token.shift_mask",
    "losses.target_positions_only": "objectives.next_token.head_only_at",
    "losses.IGNORE": "datamodules.batch.IGNORE_INDEX",
    "recomputation.elementwise_recomputed": "backbone.recomputation.recompute_elementwise",
}
"""Old attribute -> new attribute, both as ``module.name`` below ``gatera_lightning``."""


def renamed(module: str, name: str) -> Any:
    """Return what ``module.name`` is called now.

    Args:
        module: Full name of the module that had the attribute.
        name: Name of the attribute.

    Raises:
        AttributeError: The attribute was never there, or nothing took its place.
    """
    key = f"{module.removeprefix(f'{_ROOT}.')}.{name}"
    if key not in RENAMED:
        moved = " and ".join(f"{_ROOT}.{new}" for new in MOVED.get(module.removeprefix(f"{_ROOT}."), ()))
        hint = f"; it has moved to {moved}, see CHANGELOG.md" if moved else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}{hint}")
    new_module, _, new_name = RENAMED[key].rpartition(".")
    _warn(f"{_ROOT}.{key}", f"{_ROOT}.{RENAMED[key]}")
    return getattr(importlib.import_module(f"{_ROOT}.{new_module}"), new_name)


def install() -> None:
    """Let Python's import find the old names; calling it twice changes nothing."""
    if not any(isinstance(finder, _MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModuleFinder())


class _MovedModuleFinder(MetaPathFinder):
    """Answers for the modules in :data:`MOVED`, after every other finder has failed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        prefix, _, old = fullname.partition(".")
        if prefix != _ROOT or old not in MOVED:
            return None
        is_package = any(name.startswith(f"{old}.") for name in MOVED)
        return ModuleSpec(fullname, _StandInLoader(MOVED[old]), is_package=is_package)


class _StandInLoader(Loader):
    def __init__(self, new_names: tuple[str, ...]) -> None:
        self.new_names = new_names

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        _warn(old, " and ".join(f"{_ROOT}.{name}" for name in self.new_names))

        def __getattr__(name: str) -> Any:
            if not name.startswith("__"):
                for new in self.new_names:
                    found = importlib.import_module(f"{_ROOT}.{new}")
                    if hasattr(found, name):
                        return getattr(found, name)
            return renamed(old, name)

        module.__getattr__ = __getattr__  # type: ignore[method-assign]


def _warn(old: str, new: str) -> None:
    # FutureWarning, not DeprecationWarning: authors of YAML files with old names should see this.
    warnings.warn(f"{old} has moved to {new}; the old name goes away in 0.3", FutureWarning, stacklevel=2)
