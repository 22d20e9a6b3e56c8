"""AdamW on the adapter's fp32 parameters, and learning-rate schedules counted in optimizer steps."""

import functools
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gatera_lightning.adapters.gate_constraints import constrain_gates_after_steps
from gatera_lightning.adapters.lookup import adapted_linears, mask_draft_parameters
from gatera_lightning.errors import type_problems

log = logging.getLogger(__name__)

Schedule = Literal["linear", "cosine", "constant"]


@dataclass
class OptimizerConfig:
    """Settings of AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate of the update's parameters. HiRA, GateRA and ABBA need about four times LoRA's on
    SmolLM2-135M (docs/results/comparison.md)."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""

    schedule: Schedule = "linear"
    """After the warm-up: linear or cosine decay to 0 at the last step, or constant."""

    warmup_steps: int = 100
    """Optimizer steps before lr is reached; it rises linearly to it, from lr/(warmup_steps + 1)."""

    max_skipped_steps: int = 0
    """How many optimizer steps with a non-finite loss or gradient are skipped before the run stops."""

    gate_lr_multiplier: ClassVar[float | None] = None
    """Deprecated, use ``adapter.gate.lr_multiplier``; not None if the constructor received it."""

    def problems(self) -> list[str]:
        """Return one message for every value that cannot work; empty if all are valid."""
        found = type_problems("optimizer", self)
        if "lr" not in found and self.lr <= 0:
            found["lr"] = f"optimizer.lr: {self.lr}; accepted: a number above 0"
        for name in ("weight_decay", "warmup_steps", "max_skipped_steps"):
            if name not in found and getattr(self, name) < 0:
                found[name] = f"optimizer.{name}: {getattr(self, name)}; accepted: a number of at least 0"
        if not found and self.lr * self.weight_decay >= 1:  # a step multiplies by 1 - lr · weight_decay
            found["weight_decay"] = (
                f"optimizer.weight_decay: {self.weight_decay}, with lr {self.lr}: every step would turn the "
                f"signs of the parameters; accepted: below 1 / lr, {1 / self.lr:.3g}"
            )
        return list(found.values())


def _accept_gate_lr_multiplier(init: Callable[..., None]) -> Callable[..., None]:
    """Let the constructor accept the deprecated setting without listing it in its signature."""

    @functools.wraps(init)  # inspect.signature, and therefore --help, shows the wrapped signature
    def __init__(self: OptimizerConfig, *args: Any, **settings: Any) -> None:
        if "gate_lr_multiplier" in settings:
            vars(self)["gate_lr_multiplier"] = settings.pop("gate_lr_multiplier")
            warnings.warn(
                "OptimizerConfig(gate_lr_multiplier) is deprecated; use adapter.gate.lr_multiplier",
                DeprecationWarning,
                stacklevel=2,
            )
        init(self, *args, **settings)

    return __init__


OptimizerConfig.__init__ = _accept_gate_lr_multiplier(OptimizerConfig.__init__)  # type: ignore[method-assign]


def lr_factor(
    schedule: Schedule, warmup_steps: int, total_steps: Callable[[], float]
) -> Callable[[int], float]:
    """Create the function from an optimizer step ``s = 0, 1, …`` to its multiple of the learning rate.

    ``(s + 1)/(warmup_steps + 1)`` while it rises, then a decay that reaches 0 at the end.

    Args:
        schedule: Name of the decay.
        warmup_steps: Steps before the factor is 1.
        total_steps: Returns the number of optimizer steps of the run. Called only after the warm-up, when
            training runs: Lightning's Trainer answers it by building the training loader, and a loader built
            before a checkpoint is restored never receives its position.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if schedule == "constant" or step == warmup_steps:
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps() - warmup_steps))
        return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, total_steps: Callable[[], float]
) -> tuple[AdamW, LambdaLR]:
    """Create AdamW and its schedule for the adapter of a model.

    Args:
        config: Learning rate, weight decay and schedule.
        model: A model with an adapter. Its gates form a parameter group of their own, whose learning rate is
            multiplied by ``adapter.gate.lr_multiplier``; after every step, they are constrained.
        total_steps: As for :func:`lr_factor`.

    Returns:
        The optimizer, and a scheduler to step after every optimizer step.
    """
    groups = []
    gates = [layer.gate for layer in adapted_linears(model).values() if layer.gate is not None]
    for name, parameters in parameter_groups(model).items():
        lr, decay = config.lr, config.weight_decay
        if name == "gate":
            multiplier = config.gate_lr_multiplier
            if multiplier is None:
                multiplier = next(iter(adapted_linears(model).values())).config.gate.lr_multiplier
            lr *= multiplier
            decay *= all(gate.decays for gate in gates)
        groups.append({"params": list(parameters.values()), "lr": lr, "weight_decay": decay, "name": name})
    optimizer = AdamW(groups)
    # foreach is off by default for DTensors, which is ten times slower; results are equal. The flag is set
    # only during a step, so that every strategy writes the same checkpoint.
    optimizer.register_step_pre_hook(lambda optimizer, *_: _set_foreach(optimizer, True))
    optimizer.register_step_post_hook(lambda optimizer, *_: _set_foreach(optimizer, None))
    constrain_gates_after_steps(optimizer, model)
    return optimizer, LambdaLR(optimizer, lr_factor(config.schedule, config.warmup_steps, total_steps))


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of each of the optimizer's groups by name, in the optimizer's order."""
    groups: dict[str, dict[str, nn.Parameter]] = {"update": {}, "gate": {}}
    for layer_name, layer in adapted_linears(model).items():
        for name, parameter in layer.adapter_params().items():
            groups["update" if name.startswith("update.") else "gate"][f"{layer_name}.{name}"] = parameter
    groups["update"] |= mask_draft_parameters(model)
    return groups if groups["gate"] else {"update": groups["update"]}


def report_new_length(trainer: L.Trainer | None) -> None:
    """Warn if a resumed run has another length than the one that wrote its checkpoint.

    A checkpoint restores the learning rate of the step after it, as its own run would have used it; at the
    end of a linear or cosine schedule that is 0. With another ``max_steps`` or ``max_epochs``, this one step
    uses it, and the steps after it follow the schedule of the new length. A constant schedule is the same.

    Args:
        trainer: The Trainer, when training starts; None, outside of a Trainer, does nothing.
    """
    schedulers = [] if trainer is None else [config.scheduler for config in trainer.lr_scheduler_configs]
    if trainer is None or not trainer.global_step or not trainer.is_global_zero or not schedulers:
        return
    if not isinstance(scheduler := schedulers[0], LambdaLR):
        return  # a scheduler of a subclass
    restored = scheduler.optimizer.param_groups[0]["lr"]
    rate = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch)
    if rate != restored:
        log.warning(
            "the run now ends at step %s, and its checkpoint belongs to one of another length: step %d uses "
            "the checkpoint's learning rate of %.3g, which is %.3g in a run of this length, and later steps "
            "follow the new schedule",
            trainer.estimated_stepping_batches,
            trainer.global_step + 1,
            restored,
            rate,
        )


def _set_foreach(optimizer: Optimizer, foreach: bool | None) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["params"][0], DTensor):
            group["foreach"] = foreach


def squared_gradient_norms(optimizer: Optimizer, ranks: int) -> Tensor:
    """Compute this rank's part of the squared L2 norm of each parameter group's gradients; the parts add up.

    A shard contributes its own squared norm. A gradient that several ranks hold, as all of them do without
    sharding, is divided by their number. Needs no communication and no synchronization with the device.

    Args:
        optimizer: The optimizer after backward.
        ranks: Number of ranks.

    Returns:
        (groups,); 0 for a group without gradients.
    """
    parts = []
    for group in optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if not gradients:
            parts.append(torch.zeros((), device=group["params"][0].device))
            continue
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        norms = torch._foreach_mul(
            torch._foreach_norm(local), [_replicas(g, ranks) ** -0.5 for g in gradients]
        )
        parts.append(torch.stack(norms).square().sum())
    return torch.stack(parts)


def _replicas(tensor: Tensor, ranks: int) -> int:
    """How many ranks hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return ranks
    mesh = tensor.device_mesh
    return math.prod(
        mesh.size(dim) for dim, placement in enumerate(tensor.placements) if placement.is_replicate()
    )
