"""Every private name of Lightning and TensorBoard that this package depends on.

This is the file to read when one of them is upgraded. Private attributes are read and written only in the
functions below. Private methods that subclasses override or call on themselves cannot move here;
:data:`OVERRIDDEN_METHODS`, :data:`CALLED_METHODS` and :data:`INHERITED_ATTRIBUTES` list them.
tests/compatibility checks all of them against the installed versions.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from subprocess import Popen
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

OVERRIDDEN_METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "lightning.pytorch.callbacks.ModelCheckpoint": {
        "_should_save_on_train_epoch_end": ("trainer",),
        "_save_topk_checkpoint": ("trainer", "monitor_candidates"),
        "_save_checkpoint": ("trainer", "filepath"),
        "_remove_checkpoint": ("trainer", "filepath"),
    },
    "lightning.pytorch.callbacks.EarlyStopping": {
        "_should_skip_check": ("trainer",),
    },
    "lightning.pytorch.cli.LightningCLI": {
        "_parse_ckpt_path": (),
        "_run_subcommand": ("subcommand",),
    },
}
"""Private methods that subclasses here override: class -> method -> parameters after ``self``."""

CALLED_METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "lightning.pytorch.callbacks.ModelCheckpoint": {
        "_monitor_candidates": ("trainer",),
        "_save_last_checkpoint": ("trainer", "monitor_candidates"),
        "_should_skip_saving_checkpoint": ("trainer",),
    },
    "lightning.pytorch.cli.LightningCLI": {
        "_parser": ("subcommand",),
    },
}
"""Private methods that subclasses here call on themselves: class -> method -> parameters after ``self``."""

INHERITED_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "lightning.pytorch.callbacks.ModelCheckpoint": ("_last_global_step_saved",),
}
"""Private attributes that subclasses here set on themselves: class -> attributes."""


# --- Trainer ---


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Return the trainer that runs a module, or None outside of a trainer.

    The public ``module.trainer`` raises in that case.
    """
    return module._trainer


def uses_distributed_sampler(trainer: L.Trainer) -> bool:
    """Return the Trainer's argument ``use_distributed_sampler``, which it has no public attribute for."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def validates_by_time(trainer: L.Trainer) -> bool:
    """Return whether ``val_check_interval`` is a time; the Trainer then changes the public attribute."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]


def given_train_loader(trainer: L.Trainer) -> Any:
    """Return the loader that ``fit`` was called with; a data module or the module itself if it has none."""
    return trainer.fit_loop._data_source.instance


def is_accumulating(trainer: L.Trainer) -> bool:
    """Return whether the optimizer step is still incomplete after the current micro-batch.

    The public ``accumulate_grad_batches`` does not tell: the last step of an epoch may have fewer
    micro-batches.
    """
    return trainer.fit_loop._should_accumulate()


def validation_follows(trainer: L.Trainer) -> bool:
    """Return whether validation runs before the next training batch.

    A run that resumes from a checkpoint written at this point would skip that validation. Only the loop knows
    whether validation is due, and it needs its data fetcher to decide.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None  # only asked during training
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def resume_only_if_asked(trainer: L.Trainer) -> None:
    """Let a run without ``ckpt_path`` start from its first step.

    Inside a SLURM job, Lightning would resume from any ``hpc_ckpt_N.ckpt`` in ``default_root_dir``, and
    beside an OnExceptionCheckpoint from what an earlier run left. There is no public way to switch this off.
    """
    connector = trainer._checkpoint_connector
    select = connector._select_ckpt_path

    def select_given(state_fn: Any, ckpt_path: Any, *args: Any, **options: Any) -> Any:
        if ckpt_path is None and not connector._user_managed:
            return None
        return select(state_fn, ckpt_path, *args, **options)

    connector._select_ckpt_path = select_given  # type: ignore[method-assign]


def read_checkpoints_by(
    trainer: L.Trainer, read_by: Callable[[str | None, Callable[[], Mapping[str, Any] | None]], None]
) -> None:
    """Let a function decide how a Trainer reads the checkpoint of each run; later calls replace it.

    Lightning calls no hook before it reads, and none at all on a rank without a checkpoint.

    Args:
        trainer: The Trainer.
        read_by: Called on every rank with the path, or None, and a function that reads it and returns the
            entries.
    """
    connector = trainer._checkpoint_connector

    def resume_start(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        def read() -> Mapping[str, Any] | None:
            type(connector).resume_start(connector, checkpoint_path, weights_only)
            return connector._loaded_checkpoint or None

        read_by(str(checkpoint_path) if checkpoint_path else None, read)

    connector.resume_start = resume_start  # type: ignore[method-assign]


# --- strategies and launchers ---


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set a strategy's ``data_parallel_size`` after construction, once the number of ranks is known."""
    strategy._data_parallel_size = size


def set_module_device(module: L.LightningModule, device: torch.device) -> None:
    """Set what ``module.device`` returns; the public ``module.to`` would move all parameters."""
    module._device = device


def release_started_processes(trainer: L.Trainer) -> list[Popen[Any]]:
    """Return the processes that Lightning started for the other ranks, and stop monitoring them.

    Lightning kills this process as soon as it sees one of them end. The list is empty if srun or torchrun
    started the ranks. There is no public access to the processes.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    processes = list(launcher.procs)
    launcher.procs.clear()  # the same list that Lightning's monitoring thread reads
    return processes


# --- TensorBoard ---


def disable_hp_metric(logger: TensorBoardLogger) -> None:
    """Stop a logger from logging ``hp_metric`` −1, which TensorBoard would show in place of real results.

    The public way is the argument ``default_hp_metric=False``, which users' own loggers need not have.
    """
    logger._default_hp_metric = False


def write_gate_summaries(
    logger: TensorBoardLogger,
    scalars: Mapping[str, float],
    histograms: Mapping[str, Mapping[str, Any]],
    step: int,
) -> None:
    """Write many scalars and histograms as a single event, in a tenth of the time of one event for each.

    The public ``add_histogram_raw`` and ``add_scalar`` write one event each.

    Args:
        logger: The logger to write with.
        scalars: Tag -> value.
        histograms: Tag -> the fields of a ``HistogramProto``: min, max, num, sum, sum_squares, bucket_limit,
            bucket.
        step: The optimizer step.
    """
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    values += [Summary.Value(tag=tag, histo=HistogramProto(**fields)) for tag, fields in histograms.items()]
    logger.experiment._get_file_writer().add_summary(Summary(value=values), step)


def write_hparams_start(
    logger: TensorBoardLogger,
    settings: Mapping[str, str | float],
    columns: Mapping[str, type],
    results: Sequence[str],
) -> None:
    """Declare the table of the HParams tab and this run's row in it.

    The public ``add_hparams`` writes into a folder of its own and needs the results, which are not known at
    the start.

    Args:
        logger: The logger to write with.
        settings: This run's settings.
        columns: All settings that the table shows, with their type: str, or float for numbers.
        results: The tags of scalars that the table shows as results.
    """
    from tensorboard.plugins.hparams.api_pb2 import (
        DATA_TYPE_FLOAT64,
        DATA_TYPE_STRING,
        Experiment,
        HParamInfo,
        MetricInfo,
        MetricName,
    )
    from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    types = {str: DATA_TYPE_STRING, float: DATA_TYPE_FLOAT64}
    experiment = Experiment(
        hparam_infos=[HParamInfo(name=name, type=types[kind]) for name, kind in columns.items()],
        metric_infos=[MetricInfo(name=MetricName(tag=tag)) for tag in results],
        time_created_secs=time.time(),
    )
    start = SessionStartInfo(start_time_secs=time.time())
    for name, value in settings.items():
        if isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    _write_hparams_data(logger, EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))
    _write_hparams_data(logger, SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))


def write_hparams_success(logger: TensorBoardLogger) -> None:
    """Mark this run's row in the HParams tab as successful."""
    from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
    from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    end = SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time.time())
    _write_hparams_data(logger, SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def _write_hparams_data(logger: TensorBoardLogger, tag: str, data: Any) -> None:
    """Write what the HParams plugin reads: the metadata of a value without content."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.metadata import NULL_TENSOR, create_summary_metadata

    value = Summary.Value(tag=tag, tensor=NULL_TENSOR, metadata=create_summary_metadata(data))
    logger.experiment._get_file_writer().add_summary(Summary(value=[value]))
