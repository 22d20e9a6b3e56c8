"""Compare the optimizer and the schedule in a checkpoint with the settings of the run that restores them.

Restoring replaces learning rates, weight decay and AdamW's constants by those of the checkpoint. They are the
run's own unless the checkpoint was changed, and then the settings would have no effect.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from gatera_lightning.errors import CheckpointError
from gatera_lightning.training.optimizer import OptimizerConfig, lr_factor, parameter_groups

_CONSTANTS = ("betas", "eps", "amsgrad", "maximize")
"""Arguments of AdamW that have no setting."""

_MOMENTS = ("exp_avg", "exp_avg_sq")

OPTIMIZER_SETTINGS = {
    "model.optimizer.lr",
    "model.optimizer.weight_decay",
    "model.optimizer.schedule",
    "model.optimizer.warmup_steps",
    "model.adapter.gate.lr_multiplier",
}
"""Settings that the states of the optimizer and of the schedule depend on."""

Difference = tuple[str, str, Any, Any]
"""Setting, its place in the checkpoint, the value there, and the value here."""


def optimizer_differences(checkpoint: Mapping[str, Any], module: Any) -> Iterator[Difference]:
    """Yield what the optimizer or the schedule in a checkpoint has otherwise than the module's settings.

    The learning rate of a step in a decay depends on the length of the run that wrote it, so it only has to
    be possible. A module with an optimizer of its own is not compared.

    Args:
        checkpoint: The checkpoint, whose entries have the right types.
        module: The GateRAModule.
    """
    if _has_own_optimizer(module):
        return
    config: OptimizerConfig = module.optimizer
    multiplier = config.gate_lr_multiplier
    if multiplier is None:
        multiplier = module.adapter.gate.lr_multiplier
    rates = {
        "update": ("model.optimizer.lr", config.lr),
        "gate": ("model.adapter.gate.lr_multiplier", config.lr * multiplier),
    }
    constants = AdamW([torch.zeros(1)]).defaults
    for name in ("optimizer_states", "lr_schedulers"):
        if len(checkpoint.get(name, [{}])) != 1:  # Lightning restores as many as there are
            yield "model.optimizer", f"length of {name}", len(checkpoint[name]), 1
            return
    optimizer, scheduler = (
        checkpoint.get("optimizer_states", [{}])[0],
        checkpoint.get("lr_schedulers", [{}])[0],
    )
    taken = checkpoint.get("global_step", 0) - checkpoint.get("skipped_steps", 0)
    if taken > 0 and optimizer.get("state", True) == {}:
        yield "model.optimizer", "optimizer_states[0].state", {}, f"moments of {taken} steps"
    step = scheduler.get("last_epoch")
    # It may be smaller: a second fit of one Trainer starts another schedule.
    if isinstance(step, int) and step - checkpoint.get("global_step", step) > 1:
        yield "model.optimizer.schedule", "lr_schedulers[0].last_epoch", step, checkpoint["global_step"]
    if _changes_optimizers(module):
        return
    for index, group in enumerate(optimizer.get("param_groups", [])):
        place = f"optimizer_states[0].param_groups[{index}]"
        setting, peak = rates.get(group.get("name"), ("", math.nan))
        if not setting:
            yield "model.optimizer", f"{place}.name", group.get("name"), " or ".join(rates)
            continue
        expected = {"initial_lr": (setting, peak)}
        expected["weight_decay"] = ("model.optimizer.weight_decay", config.weight_decay)
        expected |= {name: (f"{name} of AdamW", constants[name]) for name in _CONSTANTS}
        for name, (owner, value) in expected.items():
            if name in group and not _equal(group[name], value):
                yield owner, f"{place}.{name}", group[name], value
        base = scheduler.get("base_lrs", [])
        if index < len(base) and not _equal(base[index], peak):
            yield setting, f"lr_schedulers[0].base_lrs[{index}]", base[index], peak
        yield from _rate_differences(config, setting, f"{place}.lr", group.get("lr"), peak, step)


def check_moments(checkpoint: Mapping[str, Any], module: Any, source: str | Path) -> None:
    """Check that AdamW's moments in a checkpoint belong to a module's parameters, before a step uses them.

    A module with an optimizer of its own is not compared.

    Args:
        checkpoint: The checkpoint with its tensors; its entries have the right types.
        module: The GateRAModule, whose model is built.
        source: Where the checkpoint is stored, for the error message.

    Raises:
        CheckpointError: A group has another number of parameters, or a moment is missing, not finite or of
            another shape.
    """
    if not _has_own_optimizer(module):
        groups = [list(group.items()) for group in parameter_groups(module.model).values()]
        if problem := next(_moment_problems(checkpoint["optimizer_states"][0], groups), None):
            raise CheckpointError(
                f"{source}: the checkpoint is corrupt: its entry optimizer_states[0].{problem}"
            )


def _moment_problems(state: Mapping[str, Any], groups: list[list[tuple[str, nn.Parameter]]]) -> Iterator[str]:
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if len(sizes) != len(groups):
        yield f"param_groups has {len(sizes)} groups; accepted: {len(groups)}"
    for index, (size, group) in enumerate(zip(sizes, groups, strict=True)):
        if size != len(group):
            yield f"param_groups[{index}].params has {size} parameters; accepted: {len(group)}"
    keys = [key for group in state["param_groups"] for key in group["params"]]
    if len(set(keys)) < len(keys):
        yield "param_groups lists a parameter twice; accepted: each once"
    named = [item for group in groups for item in group]
    for key, (name, parameter) in zip(keys, named, strict=True):
        if key not in state["state"]:
            continue  # a parameter that has had no gradient
        moments, place = state["state"][key], f"state[{key}]"
        if missing := [moment for moment in ("step", *_MOMENTS) if moment not in moments]:
            yield f"{place} lacks {', '.join(missing)} of {name}"
        for moment in _MOMENTS:
            value: Tensor = moments[moment]
            if value.shape != parameter.shape:
                accepted = f"{tuple(parameter.shape)}, as {name} has"
                yield f"{place}.{moment} has the shape {tuple(value.shape)}; accepted: {accepted}"
            if not torch.isfinite(value).all() or (moment == "exp_avg_sq" and (value < 0).any()):
                least = "finite numbers of at least 0" if moment == "exp_avg_sq" else "finite numbers"
                yield f"{place}.{moment} holds values that AdamW cannot write; accepted: {least}"


def _changes_optimizers(module: Any) -> bool:
    """Return whether a callback of somebody else's may have changed the optimizer while it trained."""
    trainer = getattr(module, "_trainer", None)
    roots = {type(callback).__module__.partition(".")[0] for callback in getattr(trainer, "callbacks", ())}
    return not roots <= {"lightning", "pytorch_lightning", "gatera_lightning"}


def _has_own_optimizer(module: Any) -> bool:
    # Of the instance, whose method a script may have replaced.
    return getattr(module.configure_optimizers, "__module__", None) != "gatera_lightning.training.module"


def _rate_differences(
    config: OptimizerConfig, setting: str, place: str, rate: Any, peak: float, step: Any
) -> Iterator[Difference]:
    """Compare the learning rate of the next step."""
    if rate is None or not isinstance(step, int):
        return
    if step <= config.warmup_steps or config.schedule == "constant":
        expected = peak * lr_factor(config.schedule, config.warmup_steps, lambda: math.inf)(step)
        if not _equal(rate, expected):
            yield setting, place, rate, expected
    elif not (isinstance(rate, int | float) and 0 <= rate <= peak * (1 + 1e-9)):
        yield setting, place, rate, f"0 to {peak:g}"


def _equal(found: Any, expected: Any) -> bool:
    """Whether two values are equal up to the rounding of a product; lists equal tuples."""
    if isinstance(expected, tuple):
        return (
            isinstance(found, list | tuple)
            and len(found) == len(expected)
            and all(map(_equal, found, expected))
        )
    if isinstance(found, bool) or isinstance(expected, bool) or not isinstance(found, int | float):
        return bool(type(found) is type(expected) and found == expected)
    return math.isclose(found, expected, rel_tol=1e-9)
