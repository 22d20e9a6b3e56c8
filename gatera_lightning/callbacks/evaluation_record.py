"""What an evaluation was computed from: its identity, and everything needed to repeat it."""

import importlib.metadata
import os
from dataclasses import asdict
from typing import Any

import lightning as L

from gatera_lightning.adapters.identity import adapter_identity, backbone_identity
from gatera_lightning.datamodules.tokenization.cache import data_hash
from gatera_lightning.evaluation.identity import FORMAT_VERSION

_PACKAGES = ("gatera-lightning", "torch", "lightning", "transformers")


def evaluation_identity(module: Any, data: Any) -> dict[str, Any]:
    """Return everything that predictions depend on, as ``evaluation.json`` stores it.

    Args:
        module: The GateRAModule.
        data: The data module, after ``setup("test")``.
    """
    judged_by_rule = data.answer_rule and "generation" in data.evaluate_by
    return {
        "format": FORMAT_VERSION,
        "backbone": backbone_identity(module.model),
        "adapter": adapter_identity(module.model),
        # The method's settings are not visible in any tensor.
        "method": {
            "update": module.adapter.update,
            "gate": module.adapter.gate.kind,
            "scale": module.adapter.scale,
        },
        "data": data_hash(data.tables["test"]),
        # The actual dtype: the setting may be "auto".
        "dtype": str(module.model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "attn_implementation": module.backbone.attn_implementation,
        "decoding": asdict(module.decoding),
        **({"answer_rule": data.answer_rule} if judged_by_rule else {}),
    }


def evaluation_record(trainer: L.Trainer, module: Any, data: Any) -> dict[str, Any]:
    """Return the settings and versions that are needed to repeat an evaluation.

    Args:
        trainer: The trainer of the run.
        module: The GateRAModule.
        data: The data module.
    """
    return {
        "model": {
            "backbone": asdict(module.backbone),
            "adapter": module.adapter.to_flat_dict(),
            "decoding": asdict(module.decoding),
            "adapter_from": _adapter_origin(trainer, module),
        },
        "data": dict(data.hparams),
        "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _adapter_origin(trainer: L.Trainer, module: Any) -> str:
    """Where the adapter's values come from: a path, ``this run`` or ``untrained``."""
    if trainer.ckpt_path:
        return str(trainer.ckpt_path)
    return "this run" if trainer.global_step else module.warm_start or "untrained"
