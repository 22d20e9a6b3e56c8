"""Check that all ranks of a run were started with the same settings and read the same training examples."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import lightning as L
import torch

from gatera_lightning.distributed.gather import gather_objects
from gatera_lightning.errors import ConfigError, as_yaml

_TRAINER_SETTINGS = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "max_steps",
    "max_epochs",
)
"""The trainer's settings that every optimizer step depends on."""

_EXAMPLES = "training examples"


def check_ranks_agree(
    module: L.LightningModule, trainer: L.Trainer, objectives: Mapping[str, Any], resumes: str | None = None
) -> None:
    """Refuse ranks with different settings or different training examples. Collective: every rank calls it.

    Ranks exchange digests first, and the values of those settings that differ afterwards.

    Args:
        module: The module; its hyperparameters are compared.
        trainer: The trainer; its strategy and data module are compared too.
        objectives: The settings of what is trained, by name; they are no hyperparameters.
        resumes: What the run resumes from, in words; None if nothing, or if that is not known yet.

    Raises:
        ConfigError: On every rank, with each setting that differs and the value that each rank has.
    """
    if not torch.distributed.is_initialized():
        return
    data: Any = getattr(trainer, "datamodule", None)
    settings = {
        **_flatten("model", dict(module.hparams)),
        **{name: repr(value) for name, value in objectives.items()},
        **_flatten("data", dict(data.hparams) if data is not None else {}),
        **_flatten("trainer", {name: getattr(trainer, name) for name in _TRAINER_SETTINGS}),
        "trainer.gradient_clip_algorithm": as_yaml(trainer.gradient_clip_algorithm or "norm"),  # Lightning's
        "trainer.strategy": type(trainer.strategy).__name__,
        "ckpt_path": resumes or "null",
    }
    tables = getattr(data, "tables", {})
    examples = "\n".join(tables["train"]["key"]) if "train" in tables else ""
    texts = {**settings, _EXAMPLES: examples}
    own = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    digests = gather_objects(own)
    names = dict.fromkeys(name for of_rank in digests for name in of_rank)
    differing = [name for name in names if len({of_rank.get(name) for of_rank in digests}) > 1]
    if not differing:
        return
    values = gather_objects({name: settings.get(name, "absent") for name in differing if name != _EXAMPLES})
    problems = []
    for name in differing:
        if name == _EXAMPLES:
            others = [rank for rank, of_rank in enumerate(digests) if of_rank[name] != digests[0][name]]
            readers = _ranks(others, "reads", "read")
            problems.append(f"{readers} different {_EXAMPLES} from rank 0; accepted: the same on every rank")
        else:
            ranks_of: dict[str, list[int]] = {}
            for rank, of_rank in enumerate(values):
                ranks_of.setdefault(of_rank[name], []).append(rank)
            found = ", ".join(f"{_ranks(ranks, 'has', 'have')} {value}" for value, ranks in ranks_of.items())
            problems.append(f"{name}: {found}; accepted: the same on every rank")
    raise ConfigError(problems, on_every_rank=True)


def _flatten(name: str, value: Any) -> dict[str, str]:
    """Return nested settings under their dotted names, each value as text."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if not isinstance(value, dict) or not value:
        return {name: as_yaml(value)}
    return {
        leaf: text for key, inner in value.items() for leaf, text in _flatten(f"{name}.{key}", inner).items()
    }


def _ranks(ranks: list[int], singular: str, plural: str) -> str:
    """Return ranks as the subject of a verb, which is given in both forms."""
    listed = ", ".join(map(str, ranks))
    return f"rank {listed} {singular}" if len(ranks) == 1 else f"ranks {listed} {plural}"
