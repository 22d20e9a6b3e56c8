"""The terms of the gates' loss in Hugging Face's ``Trainer``, and in trainers that extend it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gatera_lightning.adapters.gate_constraints import constrain_gates_after_steps
from gatera_lightning.adapters.gate_recording import GateRecord, record_gates
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.objectives.gate_entropy import summed_gate_entropy
from gatera_lightning.objectives.gate_sparsity import summed_gate_openness


class GateEntropyMixin:
    """Adds ``λ · Σ H(g) / (non-padding tokens of the step · gated layers)`` to the loss of a ``Trainer``.

    λ is the gate's ``entropy_weight``. The sum runs over gated layers and non-padding tokens, and the count
    over the whole optimizer step, with all its micro-batches and ranks, as in ``GateRAModule``. The mean
    entropy and the mean gate are logged as ``gate_entropy`` and ``gate_mean``. Gates that decide also get
    ``sparsity_weight`` times their mean openness, logged as ``gate_openness``. The optimizer gives gates
    ``lr_multiplier`` times the learning rate, unless it was given to the trainer, and constrains them after
    every step: a threshold stays at least 0. Evaluation is unchanged.

    Example:
        >>> class GatedSFTTrainer(GateEntropyMixin, SFTTrainer):
        ...     pass
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the micro-batches of a step, and count their non-padding tokens; a collective."""
        base: Any = super()
        batches, items = base.get_batch_samples(epoch_iterator, num_batches, device)
        tokens = sum(int(_mask(batch).sum()) for batch in batches)
        trainer: Any = self
        if trainer.accelerator.num_processes > 1:
            tokens = int(trainer.accelerator.gather(torch.tensor([tokens], device=device)).sum())
        self._step_tokens = max(1, tokens)
        self._logged_steps = getattr(self, "_logged_steps", 0) + 1
        return batches, items

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the trainer's own optimizer, with the gates' own learning rate and range.

        ``train`` calls this each time. An optimizer that exists already keeps its learning rates.
        """
        base: Any = super()
        trainer: Any = self
        is_new = trainer.optimizer is None
        optimizer = base.create_optimizer(*args, **kwargs)
        if is_new:
            _separate_gates(optimizer, trainer.model)
        wrapped = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it in the first `train`
        if self.__dict__.get("_constrained") is not wrapped:
            self._constrained = wrapped
            constrain_gates_after_steps(wrapped, trainer.model)
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the trainer's own loss, and add the terms of the gates in training."""
        base: Any = super()
        settings = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not model.training:
            return base.compute_loss(model, inputs, **settings)
        mask = _mask(inputs)
        with record_gates(model) as gates:
            result = base.compute_loss(model, inputs, **settings)
        term = self._gate_term(model, gates, mask)
        if term is None:
            return result
        term = term * self._later_divisor(num_items_in_batch)
        return (result[0] + term, *result[1:]) if return_outputs else result + term

    def _gate_term(self, model: nn.Module, gates: GateRecord, mask: Tensor) -> Tensor | None:
        """Return ``(λ · Σ H + μ · Σ σ(z)) / count`` of a micro-batch, a scalar; None without gates."""
        z = _first_pass(gates).stacked(mask)  # (layers, batch, tokens)
        if z is None:
            return None
        gate = next(layer.config.gate for layer in adapted_linears(model).values() if layer.gate)
        count = self._step_tokens * len(z)
        entropy = summed_gate_entropy(z if gate.entropy_weight else z.detach(), mask) / count
        term = entropy * gate.entropy_weight
        values = {"gate_entropy": entropy, "gate_mean": summed_gate_openness(z.detach(), mask) / count}
        sparsity_weight = getattr(gate, "sparsity_weight", None)
        if sparsity_weight is not None:
            openness = summed_gate_openness(z if sparsity_weight else z.detach(), mask) / count
            term = term + openness * sparsity_weight
            values["gate_openness"] = openness
        logged = self.__dict__.setdefault("_gate_values", dict.fromkeys(values, 0.0))
        for name, value in values.items():
            logged[name] += value.detach()
        return term

    def _later_divisor(self, num_items_in_batch: Any) -> int:
        """Return what the loss will be divided by: ranks, and micro-batches if the loss is a mean of each."""
        trainer: Any = self
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or trainer.compute_loss_func is not None
        steps = 1 if scaled else trainer.current_gradient_accumulation_steps
        return int(trainer.accelerator.num_processes * steps)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means of the gates' terms over the steps since the last log beside the loss."""
        values = self.__dict__.get("_gate_values")
        if values and "loss" in logs:
            trainer: Any = self
            for name, value in values.items():
                total = trainer.accelerator.gather(torch.as_tensor(value).reshape(1)).sum()
                logs[name] = float(total) / max(1, self._logged_steps)
            del self.__dict__["_gate_values"]
            self._logged_steps = 0
        base: Any = super()
        base.log(logs, *args, **kwargs)


def _separate_gates(optimizer: Optimizer, model: nn.Module) -> None:
    """Give the gates' parameters groups of their own, if their rate or weight decay differs."""
    layers = [layer for layer in adapted_linears(model).values() if layer.gate is not None]
    multiplier = next((layer.config.gate.lr_multiplier for layer in layers), 1.0)
    decay = all(layer.gate is None or layer.gate.decays for layer in layers)
    if multiplier == 1 and decay:
        return
    gates = {id(p) for layer in layers if layer.gate is not None for p in layer.gate.parameters()}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in gates]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in gates]
            settings = {"params": own, "lr": group["lr"] * multiplier}
            settings["weight_decay"] = group["weight_decay"] * decay
            optimizer.add_param_group(group | settings)


def _first_pass(gates: GateRecord) -> GateRecord:
    """Leave out further forward passes of the same micro-batch, which some trainers run for their metrics."""
    again = next((i for i, name in enumerate(gates.names) if i and name == gates.names[0]), None)
    return GateRecord(gates.names[:again], gates.logits[:again])


def _mask(batch: Mapping[str, Any]) -> Tensor:
    """Return 1 for non-padding tokens, (batch, tokens); a batch without a mask has no padding."""
    mask = batch.get("attention_mask")
    ids: Tensor = batch["input_ids"]
    return mask if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
