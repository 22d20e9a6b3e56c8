"""Train an adapter to draft tokens that the frozen model verifies."""

from collections.abc import Sequence
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gate_recording import GateRecord
from gatera_lightning.adapters.gates import is_finite_number
from gatera_lightning.adapters.position_mask import position_mask
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.probes import has_plain_frozen_head, returns_head_output
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives.base import Mean, Objective, Term
from gatera_lightning.objectives.draft_acceptance import acceptance, mean_of_sequences
from gatera_lightning.objectives.draft_form import DraftForm
from gatera_lightning.objectives.draft_layout import DraftLayout
from gatera_lightning.objectives.draft_probe import check_draft_rows
from gatera_lightning.objectives.random_ids import RandomIds

_NO_CHECKPOINTING = (
    "backbone.gradient_checkpointing: true, but draft rows attend to cached keys, which Transformers drops "
    "then; accepted with SelfDraft: false, and smaller micro-batches"
)


class SelfDraft(Objective):
    """Trains draft rows, which predict what the frozen model says at the same positions.

    Every supervised token gets a draft row, on which a LoRA behind a position gate acts
    (:class:`~gatera_lightning.objectives.draft_layout.DraftLayout`). What the row holds and what it learns
    is the form: :class:`~gatera_lightning.objectives.RandomIds`, UNO's, or
    :class:`~gatera_lightning.objectives.MaskEmbeddings`, that of Samragh et al. Nothing acts on the clean
    rows, so these are the model's own; ``data.train_on`` says where draft rows stand. Clean rows need no
    gradient. Their keys and values are computed first, without a graph, and the draft rows attend to them;
    the result is that of one sequence [draft rows | clean rows].

    Borders of blocks come from torch's generator. Validation measures the loss and greedy acceptance by
    depth and task, with the same borders every time.
    """

    gives_position_mask = True
    supports_packing = False

    def __init__(
        self,
        block_sizes: Sequence[int] = (2, 4, 8),
        steps_per_size: int | None = None,
        weight: float = 1.0,
        form: DraftForm | None = None,
    ) -> None:
        """Store the settings.

        Args:
            block_sizes: Rows of a block, that is the longest draft, one size after the other. Short blocks
                first are easier to learn. Validation uses the last one, even before it is trained.
            steps_per_size: Optimizer steps with each of several sizes but the last, which stays; null: 500.
            weight: Factor of the loss.
            form: What draft rows hold and learn; null: RandomIds.

        Raises:
            ValueError: If a setting cannot work.
        """
        if (
            not isinstance(block_sizes, list | tuple)
            or not block_sizes
            or not all(map(_is_size, block_sizes))
            or any(longer <= shorter for shorter, longer in pairwise(block_sizes))
        ):
            raise ValueError(
                f"SelfDraft: block_sizes is {block_sizes!r}; accepted: a list of integers of at least 1, "
                "each larger than the one before"
            )
        if steps_per_size is not None and not _is_size(steps_per_size):
            raise ValueError(
                f"SelfDraft: steps_per_size is {steps_per_size!r}; accepted: an integer of at least 1"
            )
        if steps_per_size is not None and len(block_sizes) == 1:
            raise ValueError(
                f"SelfDraft: steps_per_size is {steps_per_size}, but block_sizes {block_sizes!r} has a "
                "single size; accepted: null with one size, or several block_sizes"
            )
        if not (is_finite_number(weight) and weight > 0):
            raise ValueError(f"SelfDraft: weight is {weight!r}; accepted: a number above 0")
        if not (form is None or isinstance(form, DraftForm)):
            raise ValueError(f"SelfDraft: form is {form!r}; accepted: RandomIds or MaskEmbeddings")
        self.block_sizes: Sequence[int] = block_sizes
        self.steps_per_size = 500 if steps_per_size is None else steps_per_size
        self.weight = weight
        self.form: DraftForm = RandomIds() if form is None else form
        self._step = 0

    def problems(self, adapter: AdapterConfig, backbone: BackboneConfig) -> list[str]:
        """Refuse gates without a position mask, gradient checkpointing, and what the form cannot train."""
        problems = []
        kind = getattr(adapter.gate, "kind", None)  # the gate may be an unknown name
        if kind not in (None, "position"):
            problems.append(
                f"adapter.gate: {kind!r}, but SelfDraft trains an adapter that acts on draft rows only; "
                "accepted: position"
            )
        if backbone.gradient_checkpointing:
            problems.append(_NO_CHECKPOINTING)
        return problems + (self.form.problems(adapter, self.block_sizes[-1]) if kind == "position" else [])

    def prepare(self, model: PreTrainedModel) -> None:
        """Try once whether draft rows see what they should; a collective if the model is sharded.

        Raises:
            ConfigError: If they do not.
        """
        if model not in _RETURNS_HEAD_OUTPUT:
            self._probe(model)
        self.form.check(model, in_head=_head_compares(model))

    def _probe(self, model: PreTrainedModel) -> None:
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ConfigError(f"model.{_NO_CHECKPOINTING}")
        with position_mask(model, torch.zeros(2, dtype=torch.bool)):
            returns = returns_head_output(model)
        check_draft_rows(model)
        _RETURNS_HEAD_OUTPUT[model] = returns

    def begin_step(self, step: int) -> None:
        """Choose the size of the blocks."""
        self._step = step

    @property
    def block_size(self) -> int:
        """Rows of a block at the present step."""
        return self.block_sizes[min(self._step // self.steps_per_size, len(self.block_sizes) - 1)]

    def terms(self, model: PreTrainedModel, batch: Batch, gates: GateRecord) -> dict[str, Term]:
        """Run the model on the clean rows and on the draft rows.

        Raises:
            ValueError: If the batch is packed.
        """
        if "position_ids" in batch:
            raise ValueError("SelfDraft: the batch is packed; accepted: data.packing false")
        labels, size = batch["labels"], self.block_size
        layout = DraftLayout.of(labels, size, _random_offsets(labels, size))
        terms = self.form.terms(model, batch, layout, in_head=_head_compares(model))
        count = max(1, batch["step_supervised_tokens"])
        return {name: Term(total, count, weight * self.weight) for name, (total, weight) in terms.items()}

    @property
    def validation_names(self) -> tuple[str, ...]:
        """The loss, the total variation, the acceptance by depth, and the tokens of a two-forward cycle."""
        depths = range(1, self.block_sizes[-1] + 1)
        return (
            "loss",
            "total_variation",
            *(f"acceptance_{depth}" for depth in depths),
            "tokens_per_cycle",
        )

    @property
    def names_by_task(self) -> tuple[str, ...]:
        """All but the loss."""
        return self.validation_names[1:]

    @torch.no_grad()
    def validate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Mean]:
        """Measure what :attr:`validation_names` says, on blocks of the last size.

        Acceptance at depth d is the share of blocks whose first d drafts equal the most likely tokens of the
        clean rows. A cycle of two forward passes yields one token from the seed, the accepted drafts, and
        one token from the verification.
        """
        labels, size = batch["labels"], self.block_sizes[-1]
        layout = DraftLayout.of(
            labels, size, torch.zeros(len(labels), dtype=torch.long, device=labels.device)
        )
        loss, compared = self.form.measure(model, batch, layout, in_head=_head_compares(model))
        return {
            "loss": Mean(loss, len(compared)),
            "total_variation": mean_of_sequences(layout, compared[:, 0]),
            **acceptance(layout, compared[:, 1].bool(), size),
        }


_RETURNS_HEAD_OUTPUT: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Whether the models that :meth:`SelfDraft.prepare` has tried return just what their head computes."""


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _head_compares(model: PreTrainedModel) -> bool:
    return _RETURNS_HEAD_OUTPUT.get(model, False) and has_plain_frozen_head(model)


def _random_offsets(labels: Tensor, size: int) -> Tensor:
    """Draw how many rows are missing in each sequence's first block, (batch,)."""
    return torch.randint(size, (len(labels),)).to(labels.device)
