"""What a training objective is, and how the terms of several objectives become one loss.

An optimizer step is one large batch that is divided into micro-batches, over gradient accumulation and ranks.
Each term of the loss is a sum over some elements (tokens, gates, …) divided by their number in the whole
optimizer step:

    loss = Σ weight · total / count

``total`` is summed over a micro-batch and ``count`` belongs to the whole step, so the losses of the
micro-batches add up to the loss of the step. A mean over each micro-batch would weight a token by the size of
the micro-batch that it happens to be in.
"""

import functools
import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypedDict

from torch import Tensor
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gate_recording import GateRecord, record_gates
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.datamodules.batch import Batch


@dataclass(frozen=True)
class Term:
    """One term of the loss, which contributes ``weight · total / count``."""

    total: Tensor
    """Scalar, summed over the elements of this micro-batch; exactly 0 if it has none."""

    count: int | float
    """Number of elements in the whole optimizer step; above 0."""

    weight: float = 1.0
    """Factor in the loss; a term of weight 0 is only logged."""

    def __post_init__(self) -> None:
        if not isinstance(self.total, Tensor):
            raise TypeError(f"Term: total is {self.total!r:.60}; accepted: a scalar tensor")
        if not self.count > 0:
            raise ValueError(f"Term: count is {self.count}; accepted: a number above 0")


@dataclass(frozen=True)
class Mean:
    """A part of a mean over the validation split: a sum over some elements, and their number."""

    total: Tensor
    """Scalar; the sum of each sequence, (sequences,), for :attr:`Objective.names_by_task`."""

    count: Tensor | int
    """Number of elements, in the shape of ``total``; may be 0."""


class Objective(ABC):
    """A part of the training loss.

    Subclasses implement :meth:`terms`. The objectives of a step are evaluated in order; the first one that
    runs the model decides which gates the others receive.

    A resumed run must have the settings of the run that it continues. Settings are the arguments of the
    constructor; other attributes, such as counters, are free.
    """

    gives_position_mask: ClassVar[bool] = False
    """Whether it runs the model inside :func:`~gatera_lightning.position_mask`, as position gates need."""

    supports_packing: ClassVar[bool] = True
    """Whether a row of a batch may hold several sequences."""

    _given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    """The arguments of the constructor, by position and by name."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Keep the arguments, which a constructor may store under any name."""
        created = super().__new__(cls)
        object.__setattr__(created, "_given", (args, options))  # a frozen dataclass refuses others
        return created

    @property
    def given_arguments(self) -> dict[str, Any]:
        """The arguments of the constructor by the names of its parameters, defaults included.

        Those in ``**options`` have names of their own.
        """
        signature = inspect.signature(type(self).__init__)
        try:
            bound = signature.bind(self, *self._given[0], **self._given[1])
        except TypeError:  # an object that another way than the constructor has made
            return {}
        bound.apply_defaults()
        _, *parameters = signature.parameters.values()
        found: dict[str, Any] = {}
        for parameter in parameters:
            value = bound.arguments[parameter.name]
            is_options = parameter.kind is inspect.Parameter.VAR_KEYWORD
            found |= value if is_options else {parameter.name: value}
        return found

    def prepare(self, model: PreTrainedModel) -> None:
        """Find out what the model supports; called before the first step, and possibly again later.

        Args:
            model: The adapted model. If it is sharded, every rank calls this.
        """
        return

    def problems(self, adapter: AdapterConfig, backbone: BackboneConfig) -> list[str]:
        """Return one message for every setting of the model that this objective cannot train.

        Args:
            adapter: The adapter's settings, perhaps with an unknown gate.
            backbone: The backbone's settings.
        """
        return []

    def begin_step(self, step: int) -> None:  # noqa: B027  # most objectives do not depend on it
        """Called before each micro-batch of training.

        Args:
            step: Optimizer steps that were taken before; a resumed run continues to count.
        """

    @property
    def validation_names(self) -> tuple[str, ...]:
        """Names of what :meth:`validate` measures; empty: validation measures the next-token loss."""
        return ()

    @property
    def names_by_task(self) -> tuple[str, ...]:
        """Those of :attr:`validation_names` that are logged for each of several tasks, too."""
        return ()

    def validate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Mean]:
        """Measure a validation batch, instead of the next-token loss.

        Args:
            model: The adapted model, in evaluation mode.
            batch: The batch.

        Returns:
            Parts of means by name, logged as ``val/<name>`` over the whole split. One of the names should be
            ``loss``, which chooses the best checkpoint.
        """
        return {}

    @abstractmethod
    def terms(self, model: PreTrainedModel, batch: Batch, gates: GateRecord) -> dict[str, Term]:
        """Compute the terms of one micro-batch.

        Args:
            model: The adapted model, in training mode.
            batch: The micro-batch; its ``step_*`` entries count over the whole optimizer step.
            gates: Gate logits of the step's forward pass, part of the autograd graph. Empty for the objective
                that runs the model, since its own forward pass fills them.

        Returns:
            Terms by name, logged as ``train/<name>``. The names must be the same for every micro-batch.
        """


@dataclass(frozen=True)
class MicroBatchLoss:
    """What the objectives computed for one micro-batch."""

    loss: Tensor
    """Scalar ``Σ weight · total / count``, part of the autograd graph."""

    values: dict[str, Tensor]
    """``total / count`` of each term, detached; the values of a step's micro-batches add up to the step's."""

    weights: dict[str, float]
    """Weight of each term."""

    gates: GateRecord
    """Detached gate logits of the forward pass."""


class StepOutput(TypedDict):
    """What ``GateRAModule.training_step`` returns, and callbacks receive as ``outputs``."""

    loss: Tensor
    gates: GateRecord


def evaluate_objectives(
    objectives: Sequence[Objective], model: PreTrainedModel, batch: Batch
) -> MicroBatchLoss:
    """Evaluate all objectives on one micro-batch and add up their terms.

    Args:
        objectives: At least one, in the order in which they are evaluated.
        model: The adapted model, in training mode.
        batch: The micro-batch.

    Returns:
        The loss, the value of each term, and the gates.

    Raises:
        ValueError: If two objectives use the same name for a term, or there is no term at all.
    """
    gates = GateRecord()
    terms: dict[str, Term] = {}
    for objective in objectives:
        # Only the first forward pass is recorded: further ones, of a teacher say, have gates of their own.
        # Gates of a given mask say nothing new, and the mask may be of other rows than the batch.
        records = not gates.logits and not objective.gives_position_mask
        with record_gates(model) if records else nullcontext(gates) as recorded:
            found = objective.terms(model, batch, gates)
        gates = recorded
        if duplicates := terms.keys() & found.keys():
            raise ValueError(
                f"{type(objective).__name__}: another objective already has {sorted(duplicates)}"
            )
        terms |= found
    values = {name: term.total / term.count for name, term in terms.items()}
    weights = {name: term.weight for name, term in terms.items()}
    return MicroBatchLoss(
        loss=weighted_sum(values, weights),
        values={name: value.detach() for name, value in values.items()},
        weights=weights,
        gates=GateRecord(gates.names, [z.detach() for z in gates.logits]),
    )


def weighted_sum(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return ``Σ weight · value``, added in the order of ``values``.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("the objectives returned no terms; a loss needs at least one")
    return functools.reduce(operator.add, (_scaled(values[name], weights[name]) for name in values))


def _scaled(value: Tensor, weight: float) -> Tensor:
    return value if weight == 1 else weight * value
