"""What draft rows hold in training, and what they learn: the part that published methods differ in."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.objectives.draft_layout import DraftLayout


class DraftTerm(NamedTuple):
    """A term of the loss."""

    total: Tensor
    """Scalar, summed over the draft rows of a micro-batch."""

    weight: float
    """Factor in the loss."""


class DraftMeasures(NamedTuple):
    """What validation measures of the n draft rows of a batch."""

    loss: Tensor
    """Scalar, summed over the draft rows."""

    compared: Tensor
    """(n, 2): the total variation between the drafts and the model, and 1 where the most likely token is the
    same."""


class DraftForm(ABC):
    """A way to draft, which :class:`~gatera_lightning.objectives.SelfDraft` trains."""

    @property
    @abstractmethod
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms of the loss."""

    @abstractmethod
    def problems(self, adapter: AdapterConfig, longest: int) -> list[str]:
        """Return one message for every setting of the adapter that contradicts the form.

        Args:
            adapter: The adapter's settings, perhaps with an unknown gate.
            longest: Rows of the longest block.
        """

    def check(self, model: PreTrainedModel, *, in_head: bool) -> None:  # noqa: B027  # most models will do
        """Raise ConfigError if the form cannot train a model.

        Args:
            model: The adapted model.
            in_head: Whether it returns just what its plain frozen head computes.
        """

    @abstractmethod
    def terms(
        self, model: PreTrainedModel, batch: Batch, layout: DraftLayout, *, in_head: bool
    ) -> dict[str, DraftTerm]:
        """Run the model on the clean rows and on the draft rows, and compute the terms of the loss.

        Args:
            model: The adapted model, in training mode.
            batch: The micro-batch, not packed.
            layout: Its draft rows.
            in_head: As for :meth:`check`.
        """

    @abstractmethod
    def measure(
        self, model: PreTrainedModel, batch: Batch, layout: DraftLayout, *, in_head: bool
    ) -> DraftMeasures:
        """Measure the draft rows of a validation batch without a gradient; arguments as for :meth:`terms`."""
