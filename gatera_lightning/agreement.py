"""Processes of one run agree before its first step: on the settings, and on the rows."""

import hashlib
from typing import Any

import lightning as L
import torch

from gatera_lightning.errors import ConfigError

_OF_A_STEP = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "max_steps", "max_epochs")


def refuse_other_settings(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Raise ConfigError on every process when they were started with different settings, or read different rows.

    A collective. Digests travel, not settings: the message names processes, whose own logs have the rest.
    """
    if not torch.distributed.is_initialized():
        return
    data: Any = getattr(trainer, "datamodule", None)
    keys = "\n".join(data.tables["train"]["key"]) if data is not None and "train" in getattr(data, "tables", {}) else ""
    seen = {
        "settings of model": repr(dict(module.hparams)),
        "settings of data": repr(dict(data.hparams)) if data is not None else "",
        "settings of trainer": repr([getattr(trainer, name) for name in _OF_A_STEP]),
        "training rows": keys,
    }
    own = {what: hashlib.sha256(text.encode()).hexdigest() for what, text in seen.items()}
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, own)
    problems = [
        f"processes {', '.join(map(str, others))} have other {what} than process 0; accepted: the same everywhere"
        for what in seen
        if (others := [rank for rank, found in enumerate(everyone) if found[what] != everyone[0][what]])
    ]
    if problems:
        raise ConfigError(problems, on_every_process=True)
