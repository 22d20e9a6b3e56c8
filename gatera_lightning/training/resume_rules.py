"""Which settings a resumed run may change.

A checkpoint continues a run: its tensors, optimizer, schedule and position only make sense with the settings
that produced them. Every setting of the model and of the data has to stay as it was, unless :data:`FREE`
lists it, and so do the settings of the Trainer in :data:`TRAINER_SETTINGS`. Other settings of the Trainer
are free: devices, strategy and micro-batches do not change the steps, and intervals only say when something
is written. Sources of examples may move: their contents are compared, and not their names. Weights of
sources, and the size of a held-out split, may be written in another way that chooses the same examples.
``max_steps`` and ``max_epochs`` may grow: see
:func:`~gatera_lightning.training.optimizer.report_new_length`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.errors import CheckpointError, ConfigError, as_yaml
from gatera_lightning.objectives.description import describe_objectives
from gatera_lightning.training.hyperparameters import from_plain, to_plain
from gatera_lightning.training.resumed_optimizer import OPTIMIZER_SETTINGS, optimizer_differences

FREE = {
    "model.backbone.id": "the fingerprint of the weights is compared",
    "model.backbone.adapter": "the digest of its settings and values is compared",
    "model.backbone.revision": "the fingerprint of the weights is compared",
    "model.backbone.trust_remote_code": "it says what may run, not what is computed",
    "model.backbone.attn_implementation": "equal up to rounding",
    "model.backbone.gradient_checkpointing": "equal up to rounding",
    "model.backbone.compile": "equal up to rounding",
    "model.adapter.target_modules": "the names of all tensors are compared",
    "model.adapter.exclude_modules": "the names of all tensors are compared",
    "model.adapter.layers": "the names of all tensors are compared",
    "model.optimizer.max_skipped_steps": "a limit that no step depends on",
    "model.decoding": "used by evaluation only",
    "model.warm_start": "compared for evaluation as well",
    "data.data_dir": "a location; the examples of every step are compared",
    "data.eval_batch_size": "used by evaluation only",
    "data.evaluate_by": "used by evaluation only",
    "data.num_workers": "batches do not depend on it",
    "data.rank_validation": "adds values to the validation",
    "data.test": "used by evaluation only",
}
"""Settings, or sections, that a resumed run may change -> why this does not alter the run."""

TRAINER_SETTINGS = ("gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches")
"""Settings of the Trainer that every step or the order of the data depends on."""

_SOURCES = {"data.train": "train", "data.validation": "validation"}
"""Settings that only say where examples are -> the split whose contents are compared instead."""

_CHOICE = {"data.weights": "train", "data.held_out": "train", "data.validation": "validation"}
"""Settings that choose among all training examples -> a split whose choice is recorded if they do so."""

_CLIP_ALGORITHM = "trainer.gradient_clip_algorithm"
_MODEL_SECTIONS = ("backbone", "adapter", "optimizer")
_TABLES = ("model.adapter.rank_pattern", "model.adapter.alpha_pattern")
"""Settings that are compared as a whole, because a missing key is a difference."""


def recorded_settings(trainer: L.Trainer, objectives: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that Lightning does not save, for the entry ``run_settings``.

    Args:
        trainer: The Trainer.
        objectives: What describes the objectives.
    """
    settings = {f"trainer.{name}": getattr(trainer, name) for name in TRAINER_SETTINGS}
    return settings | dict(objectives) | {"seed_everything": _seed()}


def check_resume(
    checkpoint: Mapping[str, Any], module: Any, trainer: L.Trainer, data: Any, *, stage: str
) -> None:
    """Refuse settings that contradict a checkpoint.

    Args:
        checkpoint: The checkpoint, with or without its tensors.
        module: The GateRAModule that loads it.
        trainer: The Trainer.
        data: The data module; None without one.
        stage: fit, validate, test or predict; only fit compares more than ``model.warm_start``.

    Raises:
        ConfigError: With every setting that differs, its value here, and its value in the checkpoint.
        CheckpointError: The settings in the checkpoint cannot be read.
    """
    stored = _stored_module(checkpoint)
    problems = _warm_start_problems(stored.get("warm_start"), module.warm_start)
    if stage == "fit":
        differences = _differences(checkpoint, stored, module, data, trainer)
        adapter = f"model.warm_start set to the adapter folder of step {checkpoint.get('global_step')}"
        problems += [
            f"{name}: {as_yaml(new)}, but the run that the checkpoint continues has {as_yaml(old)}; "
            f"accepted: {as_yaml(old)}, or a new run without ckpt_path and with {adapter}"
            for name, old, new in differences
        ]
        problems += [
            f"{setting}: {as_yaml(new)}, but the checkpoint's optimizer has {as_yaml(old)} ({place}); "
            f"accepted: a checkpoint with {as_yaml(new)}, or a new run without ckpt_path and with {adapter}"
            for setting, place, old, new in optimizer_differences(checkpoint, module)
            if not {name for name, _, _ in differences} & OPTIMIZER_SETTINGS  # they are what differs
        ]
        problems += [
            f"{name}: the examples of {as_yaml(sources)} (SHA-256 {new[:16]}) are not those of the run that "
            f"the checkpoint continues (SHA-256 {old[:16]}); accepted: the same examples, or a new run "
            f"without ckpt_path and with {adapter}"
            for name, sources, old, new in _changed_examples(checkpoint, data)
        ]
        problems += [
            f"{name}: {as_yaml(value)} chooses other training examples here (SHA-256 {new[:16]}) than in the "
            f"run that the checkpoint continues (SHA-256 {old[:16]}); accepted: weights in the same order, "
            f"and sources of the same names, or a new run without ckpt_path and with {adapter}"
            for name, value, old, new in _changed_choice(checkpoint, data)
        ]
        problems += _length_problems(checkpoint, trainer)
    if problems:
        raise ConfigError(problems, on_every_rank=True)


def _differences(
    checkpoint: Mapping[str, Any], stored: Mapping[str, Any], module: Any, data: Any, trainer: L.Trainer
) -> list[tuple[str, Any, Any]]:
    """Settings that must not differ and do: name, value in the checkpoint, value here."""
    found: list[tuple[str, Any, Any]] = []
    classes = [name for name, entry in checkpoint.items() if _has_position(entry)]
    if data is not None and classes and type(data).__qualname__ not in classes:
        return [("data.class_path", classes[0], type(data).__qualname__)]  # its settings are others, too
    old = dict(checkpoint.get("run_settings", {}))
    new = recorded_settings(trainer, describe_objectives(module.objectives))
    for settings in (old, new):
        if settings.get(_CLIP_ALGORITHM, "") is None:
            settings[_CLIP_ALGORITHM] = "norm"  # as Lightning does
    if new["seed_everything"] is None:  # a script without seed_everything
        old.pop("seed_everything", None)
    here = to_plain({name: getattr(module, name) for name in _MODEL_SECTIONS})
    old |= _flatten("model", {name: stored[name] for name in _MODEL_SECTIONS if name in stored})
    new |= _flatten("model", here)
    old |= _data_settings(checkpoint.get("datamodule_hyper_parameters", {}))
    new |= _data_settings(data.hparams if data is not None else {})
    free = {name for name in old if _is_free(name)}
    free |= _same_sources(checkpoint, data) | _same_choice(checkpoint, data)
    for name in old.keys() & new.keys() - free:
        is_equal = old[name] == new[name] or (old[name] != old[name] and new[name] != new[name])  # NaN
        if not is_equal and not (old[name] is None and name == "seed_everything"):
            found.append((name, old[name], new[name]))
    return sorted(found)


def _same_sources(checkpoint: Mapping[str, Any], data: Any) -> set[str]:
    """Settings of sources that may differ: their examples are the same, or will be compared once read."""
    old, new = _recorded_digests(checkpoint, "examples"), _examples(data)
    return {
        name for name, split in _SOURCES.items() if split in old and (not new or new.get(split) == old[split])
    }


def _changed_examples(checkpoint: Mapping[str, Any], data: Any) -> list[tuple[str, Any, str, str]]:
    """Sources that have the same names and other examples: setting, names, old and new digest."""
    old, new = _recorded_digests(checkpoint, "examples"), _examples(data)
    before = _data_settings(checkpoint.get("datamodule_hyper_parameters", {}))
    here = _data_settings(data.hparams) if new else {}
    return [
        (name, here[name], old[split], new[split])
        for name, split in _SOURCES.items()
        if split in old and split in new and old[split] != new[split] and before.get(name) == here.get(name)
    ]


def _same_choice(checkpoint: Mapping[str, Any], data: Any) -> set[str]:
    """Settings that may differ because they choose the same examples, or will be compared once read."""
    old, new = _recorded_digests(checkpoint, "choice"), _choice(data)
    return {name for name, split in _CHOICE.items() if split in old and (not new or new == old)}


def _changed_choice(checkpoint: Mapping[str, Any], data: Any) -> list[tuple[str, Any, str, str]]:
    """The setting that is the same and chooses others of the same examples: name, value, both digests."""
    old, new = _recorded_digests(checkpoint, "choice"), _choice(data)
    before = _data_settings(checkpoint.get("datamodule_hyper_parameters", {}))
    here = _data_settings(data.hparams) if new else {}
    changed = [split for split in old if split in new and old[split] != new[split]]
    is_same = _recorded_digests(checkpoint, "examples") == _examples(data)
    if not changed or not is_same or any(before.get(name) != here.get(name) for name in _CHOICE):
        return []
    name = "data.validation" if here.get("data.weights") is None else "data.weights"
    return [(name, here.get(name), old[changed[0]], new[changed[0]])]


def _recorded_digests(checkpoint: Mapping[str, Any], entry: str) -> Mapping[str, str]:
    """The digests of a checkpoint's data; empty in one of an earlier version."""
    states = (state.get(entry) for state in checkpoint.values() if _has_position(state))
    return next((digests for digests in states if isinstance(digests, Mapping)), {})


def _examples(data: Any) -> Mapping[str, str]:
    """The digests of this run's examples; empty before they are read."""
    return data.example_digests() if isinstance(data, SupervisedDataModule) else {}


def _choice(data: Any) -> Mapping[str, str]:
    """The digests of what this run chooses among its examples; empty before they are read."""
    return data.choice_digests() if isinstance(data, SupervisedDataModule) else {}


def _length_problems(checkpoint: Mapping[str, Any], trainer: L.Trainer) -> list[str]:
    """Refuse a run that ends before the checkpoint's position."""
    problems = []
    step = checkpoint.get("global_step", 0)
    if -1 < trainer.max_steps < step:
        problems.append(
            f"trainer.max_steps: {trainer.max_steps}, but the checkpoint was written after step {step}; "
            f"accepted: at least {step}, or -1 with trainer.max_epochs"
        )
    epochs = _completed_epochs(checkpoint)
    if trainer.max_epochs is not None and -1 < trainer.max_epochs < epochs:
        problems.append(
            f"trainer.max_epochs: {trainer.max_epochs}, but the checkpoint was written after {epochs} "
            f"complete epochs; accepted: at least {epochs}"
        )
    return problems


def _completed_epochs(checkpoint: Mapping[str, Any]) -> int:
    try:
        return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]["completed"])
    except (KeyError, TypeError):  # weights alone, which the caller has refused or does not resume
        return 0


def _warm_start_problems(stored: Any, asked: str | None) -> list[str]:
    if asked is None or (isinstance(stored, str) and Path(stored).absolute() == Path(asked).absolute()):
        return []
    return [
        f"model.warm_start: {asked!r}, but the checkpoint replaces every value of the adapter; "
        "accepted: null, or no ckpt_path"
    ]


def _stored_module(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the module in a checkpoint, as plain values."""
    try:
        stored = to_plain(from_plain(checkpoint.get("hyper_parameters", {})))
        for name in _MODEL_SECTIONS:
            if not isinstance(stored.get(name, {}), Mapping):
                raise TypeError(f"{name} is {stored[name]!r:.60}; accepted: a mapping")
        return stored
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the settings in the checkpoint cannot be read: {error}") from error


def _flatten(name: str, value: Any) -> dict[str, Any]:
    """Nested settings under their dotted names."""
    if not isinstance(value, Mapping) or name in _TABLES:
        return {name: value}
    return {leaf: x for key, entry in value.items() for leaf, x in _flatten(f"{name}.{key}", entry).items()}


def _data_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a data module, with lists for tuples, and without Lightning's own entries."""
    return {
        f"data.{name}": list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if not name.startswith("_")
    }


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE)


def _has_position(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "train_position" in entry


def _seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)
