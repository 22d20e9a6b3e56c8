"""Processes of one run agree before its first step: on their number, on the settings, and on the rows."""

import hashlib
import os
from dataclasses import fields, is_dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from gatera_lightning.errors import ConfigError

_OF_A_STEP = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "max_steps",
    "max_epochs",
)
_ROWS = "training rows"


def started_by_slurm() -> bool:
    """Whether this process is a task of SLURM's, and not one that torchrun started within such a task."""
    return not TorchElasticEnvironment.detect() and SLURMEnvironment.detect()


def refuse_without_srun() -> None:
    """Raise ConfigError in a job of SLURM's whose tasks srun has not started: this one process would wait for the others."""
    if started_by_slurm() and "SLURM_STEP_ID" not in os.environ and os.environ["SLURM_NTASKS"] != "1":
        raise ConfigError(
            f"SLURM_NTASKS: {os.environ['SLURM_NTASKS']}, but this process was started without srun; accepted: srun python -m "
            "gatera_lightning …, or, for processes that SLURM does not know of, SLURM_JOB_NAME=interactive"
        )


def refuse_other_number(trainer: L.Trainer) -> None:
    """Raise ConfigError when not as many processes were started as the trainer counts on. Each would wait, or run by itself."""
    found = os.environ
    if started_by_slurm():
        who, processes, nodes = (
            "SLURM",
            int(found["SLURM_NTASKS"]),
            int(found.get("SLURM_NNODES", trainer.num_nodes)),
        )
    elif "LOCAL_RANK" in found and "WORLD_SIZE" in found:
        who, processes, nodes = "WORLD_SIZE says that torchrun", int(found["WORLD_SIZE"]), trainer.num_nodes
        if "LOCAL_WORLD_SIZE" in found:
            nodes = processes // int(found["LOCAL_WORLD_SIZE"])
    else:
        return  # Lightning starts them
    if (trainer.num_nodes, trainer.num_nodes * trainer.num_devices) != (nodes, processes):
        raise ConfigError(
            f"trainer.devices: {trainer.num_devices}, trainer.num_nodes: {trainer.num_nodes}; {who} started {processes} "
            f"processes on {nodes} nodes; accepted: --trainer.devices {processes // nodes} --trainer.num_nodes {nodes}",
            on_every_process=True,
        )


def refuse_other_settings(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Raise ConfigError on every process when they were started with different settings, or read different rows.

    A collective. Digests travel; of settings that differ, what they are.
    """
    if not torch.distributed.is_initialized():
        return
    data: Any = getattr(trainer, "datamodule", None)
    settings = {
        **_leaves("model", dict(module.hparams)),
        **_leaves("data", dict(data.hparams) if data is not None else {}),
        **_leaves("trainer", {name: getattr(trainer, name) for name in _OF_A_STEP}),
        "trainer.strategy": type(trainer.strategy).__name__,
        "ckpt_path": repr(None if trainer.ckpt_path is None else str(trainer.ckpt_path)),
    }
    rows = (
        "\n".join(data.tables["train"]["key"])
        if data is not None and "train" in getattr(data, "tables", {})
        else ""
    )
    own = {
        what: hashlib.sha256(text.encode()).hexdigest() for what, text in [*settings.items(), (_ROWS, rows)]
    }
    everyone = _gathered(own, trainer)
    names = dict.fromkeys(name for found in everyone for name in found)
    differing = [name for name in names if len({found.get(name) for found in everyone}) > 1]
    if not differing:
        return
    told = _gathered({name: settings.get(name, "absent") for name in differing if name != _ROWS}, trainer)
    problems = []
    for name in differing:
        if name == _ROWS:
            others = [rank for rank, found in enumerate(everyone) if found[name] != everyone[0][name]]
            problems.append(
                f"{_processes(others)} other {_ROWS} than process 0; accepted: the same everywhere"
            )
        else:
            held: dict[str, list[int]] = {}
            for rank, values in enumerate(told):
                held.setdefault(values[name], []).append(rank)
            seen = ", ".join(f"{_processes(ranks)} {value}" for value, ranks in held.items())
            problems.append(f"{name}: {seen}; accepted: the same everywhere")
    raise ConfigError(problems, on_every_process=True)


def _leaves(name: str, value: Any) -> dict[str, str]:
    """Settings by their full names, each as text."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if not isinstance(value, dict) or not value:
        return {name: repr(value)}
    return {
        leaf: text for key, inner in value.items() for leaf, text in _leaves(f"{name}.{key}", inner).items()
    }


def _gathered(own: dict[str, str], trainer: L.Trainer) -> list[dict[str, str]]:
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def _processes(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks))
    return f"process {listed} has" if len(ranks) == 1 else f"processes {listed} have"
