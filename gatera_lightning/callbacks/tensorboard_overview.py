"""A run at a glance in TensorBoard: the charts that matter under Custom Scalars, settings and results under HParams."""

import os
import time
from typing import Any, get_args

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    STATUS_SUCCESS,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    NULL_TENSOR,
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    create_summary_metadata,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from typing_extensions import override

from gatera_lightning.callbacks.tensorboard_loggers import tensorboard_loggers
from gatera_lightning.evaluation.likelihood_ranking import Score

_CHARTS = {  # a tag is a regular expression that has to match from the start
    "loss": {
        "task loss, nats per target token": ["train/task_loss$", "val/loss$"],
        "loss with the entropy term": ["train/loss$"],
    },
    "gates": {
        "entropy, nats": ["train/gate_entropy$", "gates/(prompt|response)/entropy$"],
        "mean": ["train/gate_mean$", "gates/(prompt|response)/mean$"],
        "share closed (g < 0.1)": ["gates/(prompt|response)/share_closed$"],
        "share open (g ≥ 0.9)": ["gates/(prompt|response)/share_open$"],
        "mean of each family, prompt": ["gate_families/.*/prompt/mean$"],
        "mean of each family, response": ["gate_families/.*/response/mean$"],
    },
    "optimizer": {
        "learning rate": ["lr/update$", "lr/gate$"],
        "gradient norm": ["grad_norm/update$", "grad_norm/gate$"],
    },
    "speed": {
        "tokens a second": ["throughput/tokens_per_second$", "throughput/target_tokens_per_second$"],
        "seconds a step": ["throughput/step_seconds$", "throughput/data_wait_seconds$"],
        "model TFLOP/s": ["throughput/model_tflops$"],
        "model FLOPs utilization": ["throughput/model_flops_utilization$"],
        "memory, GiB": ["throughput/memory_gib$"],
    },
}

# TensorBoard takes the columns of its table from whichever run it reads first: every run has to name the same ones.
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
    """Writes, when training or a test starts, which scalars to show together, and the settings beside which results stand.

    A result is the last value of its scalar, so a run that fails has its own too. Nothing is written twice into one folder,
    where a run goes on; nothing without a TensorBoard logger.
    """

    def __init__(self) -> None:
        self._written: list[str] = []
        self._ended: set[str] = set()

    @override
    def state_dict(self) -> dict[str, Any]:
        """The folders in which it stands."""
        return {"written": self._written}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._written = list(state_dict["written"])

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep Lightning from inventing a result (``hp_metric`` −1), which TensorBoard would show instead of the real ones."""
        for logger in tensorboard_loggers(trainer):
            logger._default_hp_metric = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A test by itself has a folder of its own."""
        self._begin(trainer, pl_module)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        settings = settings_of(trainer, pl_module)
        for logger in tensorboard_loggers(trainer):
            folder = os.path.abspath(logger.log_dir)
            if folder in self._written:
                continue
            self._written = [*self._written, folder]
            logger.experiment.add_custom_scalars(
                {
                    part: {chart: ["Multiline", tags] for chart, tags in charts.items()}
                    for part, charts in _CHARTS.items()
                    if part != "gates" or settings["gate"] != "none"
                }
            )
            types = {str: DATA_TYPE_STRING, float: DATA_TYPE_FLOAT64}
            columns = [HParamInfo(name=name, type=types[kind]) for name, kind in _SETTINGS.items()]
            results = [MetricInfo(name=MetricName(tag=tag)) for tag in _RESULTS]
            experiment = Experiment(hparam_infos=columns, metric_infos=results, time_created_secs=time.time())
            start = SessionStartInfo(start_time_secs=time.time())
            for name, value in settings.items():
                if isinstance(value, str):
                    start.hparams[name].string_value = value
                else:
                    start.hparams[name].number_value = value
            _write(logger, EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))
            _write(logger, SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that all went well. Of a failure nothing is said: TensorBoard believes the first end, and a run may yet go on."""
        self._end(trainer)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer)

    def _end(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        end = SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time.time())
        for logger in tensorboard_loggers(trainer):
            if logger.log_dir not in self._ended:
                self._ended.add(logger.log_dir)
                _write(logger, SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def settings_of(trainer: L.Trainer, module: Any) -> dict[str, Any]:
    """What tells one run from another, flat; what is not set, or means nothing without gates, is left out."""
    data: Any = getattr(trainer, "datamodule", None)
    adapter, optimizer = module.adapter, module.optimizer
    found = {
        "backbone": module.backbone.id,
        "update": adapter.update,
        "gate": adapter.gate.kind,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "dropout": adapter.dropout,
        "target_modules": ", ".join(adapter.target_modules),
        "layers": None if adapter.layers is None else ", ".join(map(str, adapter.layers)),
        "lr": optimizer.lr,
        "schedule": optimizer.schedule,
        "warmup_steps": optimizer.warmup_steps,
        "weight_decay": optimizer.weight_decay,
        "max_steps": trainer.max_steps if trainer.max_steps > 0 else None,
        "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
    }
    if adapter.gate.kind != "none":
        found["gate_bias"] = adapter.gate.bias
        found["gate_entropy_weight"] = module.gate_entropy_weight
        found["gate_lr_multiplier"] = optimizer.gate_lr_multiplier
    if data is not None:
        found["data"] = ", ".join(data.hparams.get("train") or [type(data).__name__])
        found["batch_size"] = data.batch_size
        found["template"] = getattr(data, "template", None)  # not every source of tokens has one
        found["train_on"] = data.train_on
    return {name: found[name] for name in _SETTINGS if found.get(name) is not None}


def _write(logger: TensorBoardLogger, tag: str, data: HParamsPluginData) -> None:
    """What the HParams plugin reads lies in the metadata of a value that is nothing."""
    value = Summary.Value(tag=tag, tensor=NULL_TENSOR, metadata=create_summary_metadata(data))
    logger.experiment._get_file_writer().add_summary(Summary(value=[value]))
