"""An overview of each run in TensorBoard: charts under Custom Scalars, settings and results under HParams."""

import os
from typing import Any, get_args

import lightning as L
from typing_extensions import override

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.callbacks.run_logs.tensorboard import tensorboard_loggers
from gatera_lightning.compatibility.lightning_internals import (
    disable_hp_metric,
    write_hparams_start,
    write_hparams_success,
)
from gatera_lightning.datamodules.validation_tasks import validation_tasks
from gatera_lightning.evaluation.likelihood_ranking import Score
from gatera_lightning.gate_analysis.skipped_tokens import gates_decide
from gatera_lightning.objectives.mask_embeddings import MaskEmbeddings
from gatera_lightning.objectives.self_draft import SelfDraft

# Section -> title of a chart -> the tags it shows, as regular expressions that match from the start of a tag.
_CHARTS: dict[str, dict[str, list[str]]] = {
    "loss": {
        "task loss, nats per supervised token": ["train/task_loss$", "val/loss$"],
        "total loss, with the entropy term": ["train/loss$"],
    },
    "gates": {
        "entropy, nats": ["train/gate_entropy$", "gates/(prompt|response)/entropy$"],
        "mean": ["train/gate_mean$", "gates/(prompt|response)/mean$"],
        "share closed (g < 0.1)": ["gates/(prompt|response)/share_closed$"],
        "share open (g ≥ 0.9)": ["gates/(prompt|response)/share_open$"],
        "mean by projection type, prompt": ["gate_families/.*/prompt/mean$"],
        "mean by projection type, response": ["gate_families/.*/response/mean$"],
    },
    "skipped tokens": {
        "share of tokens that gates skip": ["train/gate_skipped$", "gates/(prompt|response)/share_skipped$"],
        "by layer, response": ["gate_layers/.*/response/share_skipped$"],
    },
    "drafts": {
        "total variation, share of drafts that sampling rejects": [
            "train/total_variation$",
            "val/total_variation$",
        ],
        "greedy acceptance by depth": [r"val/acceptance_\d+$"],
        "tokens per cycle of two forward passes": ["val/tokens_per_cycle$"],
    },
    "drafts by task": {
        "greedy acceptance of first drafts": ["val/acceptance_1/.*"],
        "tokens per cycle of two forward passes": ["val/tokens_per_cycle/.*"],
    },
    "losses of mask embeddings": {
        "cross-entropy, nats": ["train/base_head_loss$", "train/sampler_loss$"],
        "consistency of latents": ["train/consistency$"],
    },
    "optimizer": {
        "learning rate": ["lr/update$", "lr/gate$"],
        "gradient norm": ["grad_norm/update$", "grad_norm/gate$"],
    },
    "speed": {
        "tokens per second": ["throughput/tokens_per_second$", "throughput/target_tokens_per_second$"],
        "seconds per step": ["throughput/step_seconds$", "throughput/data_wait_seconds$"],
        "model TFLOP/s": ["throughput/model_tflops$"],
        "model FLOPs utilization": ["throughput/model_flops_utilization$"],
        "memory, GiB": ["throughput/memory_gib$"],
    },
}

# TensorBoard takes the columns of its table from one run, whichever it reads first, so all runs declare the
# same.
_SETTINGS: dict[str, type] = {
    "backbone": str,
    "update": str,
    "gate": str,
    "rank": float,
    "alpha": float,
    "dropout": float,
    "target_modules": str,
    "layers": str,
    "gate_bias": float,
    "gate_entropy_weight": float,
    "lr": float,
    "gate_lr_multiplier": float,
    "schedule": str,
    "warmup_steps": float,
    "weight_decay": float,
    "max_steps": float,
    "data": str,
    "template": str,
    "train_on": str,
    "batch_size": float,
    "seed": float,
}
_RESULTS = (
    "train/task_loss",
    "val/loss",
    *(f"val/accuracy_{score}" for score in get_args(Score)),
    "test/loss",
    *(f"test/accuracy_{score}" for score in (*get_args(Score), "generation")),
)


class TensorBoardOverview(L.Callback):
    """Give each run an overview in TensorBoard.

    When training or a test starts, writes the layout of the Custom Scalars tab, and the run's row in the
    table of the HParams tab: its settings beside its results. A result is the last value of a scalar, so a
    run that fails has results too. A resumed run that logs to the same folder writes nothing twice. Without a
    TensorBoard logger the callback does nothing.

    Example:
        >>> trainer = Trainer(callbacks=[TensorBoardOverview()])
    """

    def __init__(self) -> None:
        self._written: list[str] = []
        self._ended: set[str] = set()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the log folders that already have their overview."""
        return {"written": self._written}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._written = list(state_dict["written"])

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for logger in tensorboard_loggers(trainer):
            disable_hp_metric(logger)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write_start(trainer, pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write_start(trainer, pl_module)  # a test that follows no training has a log folder of its own

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write_success(trainer)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write_success(trainer)

    def _write_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        module: Any = pl_module
        settings = run_settings(trainer, pl_module)
        drafts = [each for each in getattr(module, "objectives", ()) if isinstance(each, SelfDraft)]
        absent = {"loss"} if drafts else {"drafts"}
        if not drafts or not validation_tasks(getattr(trainer, "datamodule", None)):
            absent.add("drafts by task")
        if not any(isinstance(objective.form, MaskEmbeddings) for objective in drafts):
            absent.add("losses of mask embeddings")
        if settings["gate"] == "none" or drafts:  # gates of draft rows are given
            absent.add("gates")
        if drafts or not gates_decide(module.model):
            absent.add("skipped tokens")
        for logger in tensorboard_loggers(trainer):
            folder = os.path.abspath(logger.log_dir)
            if folder in self._written:
                continue
            self._written = [*self._written, folder]
            logger.experiment.add_custom_scalars(
                {
                    section: {chart: ["Multiline", tags] for chart, tags in charts.items()}
                    for section, charts in _CHARTS.items()
                    if section not in absent
                }
            )
            write_hparams_start(logger, settings, _SETTINGS, _RESULTS)

    def _write_success(self, trainer: L.Trainer) -> None:
        # A failure is not recorded: TensorBoard shows only the first end, and a failed run may resume.
        if not trainer.is_global_zero:
            return
        for logger in tensorboard_loggers(trainer):
            if logger.log_dir not in self._ended:
                self._ended.add(logger.log_dir)
                write_hparams_success(logger)


def _targets_in_words(adapter: AdapterConfig) -> str:
    """Return the settings that choose layers and their ranks, which have one column of the table."""
    targets = adapter.target_modules
    text = targets if isinstance(targets, str) else ", ".join(targets)
    if adapter.exclude_modules:
        text += f", without {', '.join(adapter.exclude_modules)}"
    for name, patterns in (("rank", adapter.rank_pattern), ("alpha", adapter.alpha_pattern)):
        text += "".join(f"; {name} {value} for {key}" for key, value in patterns.items())
    return text


def run_settings(trainer: L.Trainer, module: Any) -> dict[str, Any]:
    """Return the settings that distinguish runs, without those that are null or need a missing gate.

    Args:
        trainer: The trainer of the run.
        module: The GateRAModule.
    """
    data: Any = getattr(trainer, "datamodule", None)
    adapter, optimizer = module.adapter.to_flat_dict(), module.optimizer
    if adapter["gate"] == "none":
        adapter = {name: value for name, value in adapter.items() if not name.startswith("gate_")}
    found = adapter | {
        "backbone": module.backbone.id,
        "target_modules": _targets_in_words(module.adapter),
        "layers": None if adapter["layers"] is None else ", ".join(map(str, adapter["layers"])),
        "lr": optimizer.lr,
        "schedule": optimizer.schedule,
        "warmup_steps": optimizer.warmup_steps,
        "weight_decay": optimizer.weight_decay,
        "max_steps": trainer.max_steps if trainer.max_steps > 0 else None,
        "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
    }
    if data is not None:
        found["data"] = ", ".join(data.hparams.get("train") or [type(data).__name__])
        found["batch_size"] = data.batch_size
        found["template"] = getattr(data, "template", None)  # some data modules have no prompt template
        found["train_on"] = data.train_on
    return {name: found[name] for name in _SETTINGS if found.get(name) is not None}
