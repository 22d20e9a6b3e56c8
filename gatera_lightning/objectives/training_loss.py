"""The loss of one batch, for training loops that do not use Lightning."""

from collections.abc import Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch
from gatera_lightning.objectives.base import Objective, evaluate_objectives
from gatera_lightning.objectives.gate_entropy import GateEntropy
from gatera_lightning.objectives.gate_sparsity import GateSparsity
from gatera_lightning.objectives.next_token import NextToken


def training_loss(
    model: PreTrainedModel, batch: Mapping[str, Any], *, objectives: Sequence[Objective] | None = None
) -> Tensor:
    """Compute the loss of one batch as GateRAModule does: ``L = L_task + λ · L_ent`` (GateRA, AAAI 2026).

    ::

        inject_adapters(model, AdapterConfig())
        optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-3)
        model.train()
        for batch in loader:
            training_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    The output head runs at supervised positions only and computes the loss itself where the model allows it;
    cheap elementwise outputs are recomputed in the backward pass instead of being saved. So call ``backward``
    once per loss.

    Args:
        model: A model with an adapter, in training mode.
        batch: ``input_ids``, ``attention_mask`` (1 = not padding) and ``labels`` (-100 = not supervised),
            each (batch, tokens), on the model's device; labels are not shifted. ``step_supervised_tokens``
            and ``step_tokens`` say over how many tokens to average if the batch is a part of an optimizer
            step; they default to the numbers of this batch.
        objectives: What to train; default: :func:`default_objectives` of the model.

    Returns:
        A scalar, part of the autograd graph.

    Raises:
        TypeError: If the batch is no mapping of tensors, or an objective is none.
        ValueError: If the batch lacks one of the three tensors, or their shapes differ.
    """
    _check_batch(batch)
    if objectives is None:
        if model not in _DEFAULTS:
            _DEFAULTS[model] = default_objectives(model)
        objectives = _DEFAULTS[model]
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise TypeError(
                f"training_loss: {objective!r:.60} among objectives; accepted: instances of Objective"
            )
        objective.prepare(model)
    return evaluate_objectives(objectives, model, _with_totals(batch)).loss


def _check_batch(batch: Mapping[str, Any]) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"training_loss: batch is a {type(batch).__name__}; accepted: a mapping of tensors")
    names = ("input_ids", "attention_mask", "labels")
    if missing := [name for name in names if name not in batch]:
        raise ValueError(f"training_loss: the batch has no {', '.join(missing)}; it has {', '.join(batch)}")
    for name in names:
        if not isinstance(batch[name], Tensor):
            raise TypeError(
                f"training_loss: batch[{name!r}] is a {type(batch[name]).__name__}; accepted: a tensor"
            )
        if name != "attention_mask" and batch[name].is_floating_point():
            raise TypeError(f"training_loss: batch[{name!r}] has {batch[name].dtype}; accepted: token ids")
    shapes = {name: tuple(batch[name].shape) for name in names}
    if len(set(shapes.values())) > 1 or len(shapes["labels"]) != 2:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"training_loss: {found}; accepted: three tensors of one shape (batch, tokens)")


def default_objectives(model: PreTrainedModel) -> list[Objective]:
    """Return next-token cross-entropy, and the gate's terms with the weights in its settings.

    All gates have the entropy; gates with a ``sparsity_weight`` have the sparsity as well.

    Raises:
        ValueError: If the model has no adapter.
    """
    layers = adapted_linears(model)
    if not layers:
        raise ValueError("the model has no adapted layers; call inject_adapters or load_adapter first")
    return objectives_for(next(iter(layers.values())).config)


def objectives_for(adapter: AdapterConfig) -> list[Objective]:
    """Return what an adapter with these settings is trained on by default; see :func:`default_objectives`."""
    weight = getattr(adapter.gate, "entropy_weight", 0.0)  # the gate may be an unknown name, not yet reported
    sparsity = getattr(adapter.gate, "sparsity_weight", None)
    return [NextToken(), GateEntropy(weight), *([] if sparsity is None else [GateSparsity(sparsity)])]


def objectives_problems(objectives: Sequence[Objective], adapter: AdapterConfig) -> list[str]:
    """Return a message for each weight of the gate that has no effect with these objectives.

    Args:
        objectives: What is trained.
        adapter: The adapter's settings.
    """
    problems = []
    for setting, term in (("entropy_weight", GateEntropy), ("sparsity_weight", GateSparsity)):
        weight = getattr(adapter.gate, setting, 0.0)
        weights = [objective.weight for objective in objectives if isinstance(objective, term)]
        if not weight or weights == [weight]:
            continue
        name = term.__name__
        found = f"{name} has the weight {weights[0]}" if weights else f"there is no {name}"
        problems.append(
            f"adapter.gate.{setting}: {weight}, but among the objectives {found}; accepted: one "
            f"{name}({weight}), or {setting} 0"
        )
    return problems


_DEFAULTS: WeakKeyDictionary[PreTrainedModel, list[Objective]] = WeakKeyDictionary()


def _with_totals(batch: Mapping[str, Any]) -> Batch:
    counted = dict(batch)
    if "step_supervised_tokens" not in counted:
        counted["step_supervised_tokens"] = int((counted["labels"][:, 1:] != IGNORE_INDEX).sum())
    if "step_tokens" not in counted:
        counted["step_tokens"] = int(counted["attention_mask"].sum())
    return cast(Batch, counted)
