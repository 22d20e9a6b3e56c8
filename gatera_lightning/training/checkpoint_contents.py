"""What a checkpoint holds of the model: the adapter's tensors and where they belong, never the backbone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.identity import backbone_fingerprints, check_fit
from gatera_lightning.adapters.lookup import adapter_parameters, frozen_adapter
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.checkpointing.contents import check_entries
from gatera_lightning.checkpointing.data_position import begin_next_epoch, recount_batches
from gatera_lightning.errors import AdapterFileError, CheckpointError, ConfigError
from gatera_lightning.training.resume_rules import check_resume, recorded_settings

_MODEL = "model."  # the prefix of the model's tensors in the state of a LightningModule


def keep_adapter_tensors(state: dict[str, Any], model: nn.Module | None, prefix: str = "") -> None:
    """Remove everything but the adapter's tensors from a LightningModule's state dict, in place.

    Args:
        state: The state dict.
        model: The adapted model, the module's attribute ``model``; None before it is built.
        prefix: The prefix with which the state dict was requested.
    """
    names = [] if model is None else adapter_parameters(model)
    own = {f"{prefix}{_MODEL}{name}" for name in names}
    for name in list(state):
        if name not in own:
            del state[name]


def adapter_key_problems(
    model: nn.Module, missing: list[str], unexpected: list[str], *, strict: bool
) -> tuple[list[str], list[str]]:
    """Return the missing and unexpected keys of a loaded state dict; frozen tensors may be missing.

    Raises:
        RuntimeError: If ``strict`` and there is any.
    """
    own = {f"{_MODEL}{name}" for name in adapter_parameters(model)}
    missing = [name for name in missing if name in own]
    if strict and (missing or unexpected):
        raise RuntimeError(f"missing adapter tensors: {missing}; unexpected tensors: {unexpected}")
    return missing, unexpected


def describe_adapter(model: nn.Module, adapter: AdapterConfig, backbone: BackboneConfig) -> dict[str, Any]:
    """Return the entries ``adapter`` and ``backbone`` of a checkpoint.

    Args:
        model: The adapted model.
        adapter: Its adapter's settings.
        backbone: Where its frozen weights came from; the Hugging Face config may know their revision.
    """
    return {
        "adapter": adapter.to_dict(),
        "backbone": {
            "id": backbone.id,
            "revision": backbone.revision or getattr(model.config, "_commit_hash", None),
            **backbone_fingerprints(model),
            "attn_implementation": getattr(model.config, "_attn_implementation", None),
        },
    }


def describe_run(
    trainer: L.Trainer | None, skipped_steps: int, objectives: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the entries that describe the run of a checkpoint, and that Lightning does not save."""
    data = getattr(trainer, "datamodule", None)
    settings = {} if trainer is None else recorded_settings(trainer, objectives)
    template = getattr(data, "template", None)
    template = template if isinstance(template, str) else None  # a data module of somebody else's
    return {"template": template, "run_settings": settings, "skipped_steps": skipped_steps}


def check_contents(contents: dict[str, Any], source: str | Path, *, resumes: bool = False) -> None:
    """Check what a checkpoint alone tells: its entries, their types and the names of the adapter's settings.

    Args:
        contents: The entries of the checkpoint.
        source: Where it is stored, for the error message.
        resumes: Whether it has to resume a run.

    Raises:
        CheckpointError: An entry is missing or has another type, or the adapter has unknown settings.
    """
    check_entries(contents, source, resumes=resumes)
    _stored_adapter(contents, source)


def _stored_adapter(contents: Mapping[str, Any], source: str | Path) -> AdapterConfig:
    try:
        return AdapterConfig.from_dict(contents["adapter"])
    except ConfigError as error:
        raise CheckpointError(f"{source}: its entry adapter cannot be read: {error}") from error


def check_settings(checkpoint: dict[str, Any], module: L.LightningModule, trainer: L.Trainer | None) -> None:
    """Check that a checkpoint is one of an adapter, and that the settings of a run do not contradict it.

    Raises:
        CheckpointError: If an entry is missing.
        ConfigError: With every setting that differs.
    """
    check_contents(checkpoint, checkpoint_source(trainer), resumes=resumes_fit(trainer))
    if trainer is not None and trainer.state.fn is not None:
        data = getattr(trainer, "datamodule", None)
        check_resume(checkpoint, module, trainer, data, stage=trainer.state.fn.value)


def adjust_position(checkpoint: dict[str, Any], trainer: L.Trainer | None) -> None:
    """Adjust a checkpoint's position in the data to this run's micro-batches per step, if there is a run."""
    if trainer is None:
        return
    recount_batches(checkpoint, trainer.accumulate_grad_batches)
    if trainer.max_steps != -1 and "loops" in checkpoint:
        begin_next_epoch(checkpoint)


def resumes_fit(trainer: L.Trainer | None) -> bool:
    """Return whether a trainer that restores a checkpoint resumes training from it."""
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def checkpoint_source(trainer: L.Trainer | None) -> str:
    """Return the path of the checkpoint that a trainer restores, for error messages."""
    return str(getattr(trainer, "ckpt_path", None) or "the checkpoint")


def check_checkpoint_fits(
    checkpoint: dict[str, Any], model: nn.Module, source: str = "the checkpoint"
) -> None:
    """Check that a checkpoint belongs to the adapter and the backbone of a model.

    Args:
        checkpoint: A checkpoint of an adapter.
        model: The adapted model.
        source: Where the checkpoint is stored, for the error message.

    Raises:
        CheckpointError: If the method, the names, shapes or dtypes of the tensors, the backbone, or the
            trained adapter that is part of it differ.
    """
    tensors = {name.removeprefix(_MODEL): tensor for name, tensor in checkpoint["state_dict"].items()}
    adapter = _stored_adapter(checkpoint, source)
    try:
        check_fit(model, adapter, checkpoint["backbone"], tensors, source)
    except AdapterFileError as error:
        raise CheckpointError(str(error)) from error
    frozen = frozen_adapter(model)
    stored, here = checkpoint["backbone"].get("adapter_sha256"), None if frozen is None else frozen[1]
    if stored != here:
        raise CheckpointError(
            f"{source}: model.backbone.adapter is another one here ({_in_words(here)}) than in the run that "
            f"wrote it ({_in_words(stored)}); accepted: the same adapter, in any folder"
        )


def _in_words(digest: str | None) -> str:
    return "none" if digest is None else f"SHA-256 {digest[:16]}"
