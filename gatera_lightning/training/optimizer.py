"""AdamW on the adapter's fp32 masters, and learning-rate schedules counted in optimizer steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gatera_lightning.adapters.injection import adapted_linears

Schedule = Literal["linear", "cosine", "constant"]


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate of the update's parameters. HiRA and GateRA want about ten times LoRA's."""

    gate_lr_multiplier: float = 1.0
    """The gate's learning rate as a multiple of lr."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""

    schedule: Schedule = "linear"
    """After the warm-up: linear or cosine decay to 0 at the last step, or constant."""

    warmup_steps: int = 100
    """Optimizer steps over which lr rises linearly from 0."""

    max_skipped_steps: int = 0
    """Optimizer steps with a loss or gradient that is not finite that are left out, and counted, before the run stops."""

    def problems(self) -> list[str]:
        """Everything about these values that cannot work; empty when all is well."""
        found = []
        if self.schedule not in get_args(Schedule):
            found.append(
                f"optimizer.schedule: {self.schedule!r} is unknown; accepted: {', '.join(get_args(Schedule))}"
            )
        if not 0 < self.lr < math.inf:
            found.append(f"optimizer.lr: {self.lr}; accepted: a number above 0")
        for name in ("gate_lr_multiplier", "weight_decay", "warmup_steps", "max_skipped_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"optimizer.{name}: {getattr(self, name)}; accepted: a number of at least 0")
        return found


def lr_factor(
    schedule: Schedule, warmup_steps: int, total_steps: Callable[[], float]
) -> Callable[[int], float]:
    """The multiple of lr at optimizer step s = 0, 1, …: (s + 1)/(warmup + 1) rising, then falling to 0 at the end.

    ``total_steps`` is asked only after the warm-up, when training runs. Asking Lightning's Trainer earlier makes it build
    the training loader before a checkpoint is restored, and it then never restores the loader's position.
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
    """AdamW over the adapter of ``model``, its gates as a group of their own, with the configured schedule."""
    layers = adapted_linears(model).values()
    updates = [p for layer in layers for p in layer.update.parameters()]
    gates = [p for layer in layers if layer.gate is not None for p in layer.gate.parameters()]
    groups = [{"params": updates, "lr": config.lr, "name": "update"}]
    if gates:
        groups.append({"params": gates, "lr": config.lr * config.gate_lr_multiplier, "name": "gate"})
    optimizer = AdamW(groups, weight_decay=config.weight_decay)
    # Sharded parameters are stepped in few calls, as AdamW by itself steps whole ones on a GPU: the same numbers, a tenth of
    # the time. The flag stands for the step only, so that every strategy writes the same checkpoint.
    optimizer.register_step_pre_hook(lambda optimizer, *_: _set_foreach(optimizer, True))
    optimizer.register_step_post_hook(lambda optimizer, *_: _set_foreach(optimizer, None))
    return optimizer, LambdaLR(optimizer, lr_factor(config.schedule, config.warmup_steps, total_steps))


def _set_foreach(optimizer: Optimizer, together: bool | None) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["params"][0], DTensor):
            group["foreach"] = together


def squared_gradient_norms(optimizer: Optimizer, processes: int) -> Tensor:
    """This process's part of the squared L2 norm of each parameter group's gradients, (groups,): over processes they add up.

    Of a shard that is its own square; what several processes hold alike, as all of them do without sharding, is divided by
    their number. Needs no communication and no look at a number. 0 without gradients.
    """
    parts = []
    for group in optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if not gradients:
            parts.append(torch.zeros((), device=group["params"][0].device))
            continue
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        norms = torch._foreach_mul(
            torch._foreach_norm(local), [_copies(g, processes) ** -0.5 for g in gradients]
        )
        parts.append(torch.stack(norms).square().sum())
    return torch.stack(parts)


def _copies(tensor: Tensor, processes: int) -> int:
    """How many processes hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return processes
    mesh = tensor.device_mesh
    return math.prod(
        mesh.size(dim) for dim, placement in enumerate(tensor.placements) if placement.is_replicate()
    )
