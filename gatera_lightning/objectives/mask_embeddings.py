"""Draft rows read learned mask embeddings, and a sampler head chooses drafts (Samragh et al., 2507.11851)."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gates import is_finite_number
from gatera_lightning.adapters.mask_drafts import MASK_DRAFTS, MaskDrafts
from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives.draft_form import DraftForm, DraftMeasures, DraftTerm
from gatera_lightning.objectives.draft_forward import clean_rows, draft_rows
from gatera_lightning.objectives.draft_layout import DraftLayout
from gatera_lightning.objectives.linear_cross_entropy import linear_cross_entropy
from gatera_lightning.objectives.next_token import shift_labels
from gatera_lightning.objectives.total_variation import compare_hidden


class _Rows(NamedTuple):
    """The n draft rows of a batch; a latent is what the output head receives."""

    latents: Tensor
    """z, (n, width)."""

    expected: Tensor
    """The latents z_t of the model itself at the same positions, (n, width), without a graph."""

    sampled: Tensor
    """What the sampler head gives the output head, (n, width)."""

    labels: Tensor
    """The tokens to predict, (n,); ``IGNORE_INDEX`` where the token after a row is not supervised."""


@dataclass(frozen=True)
class MaskEmbeddings(DraftForm):
    """The form of Samragh et al. (arXiv 2507.11851), which learns the text that it is given.

    ::

        L = 1/N Σ_rows [CE(head(z), y) + CE(head(sampler(e, z)), y) + λ/width · ‖sg(z_t) − z‖²]

    z is the latent of a draft row, z_t the model's own latent at its position, y the token after it, and e
    the embedding of the token at its position, which the row itself does not see. The heads are the model's
    frozen one. Rows whose next token is not supervised have the consistency term only. The parameters beside
    the update are those of :class:`~gatera_lightning.adapters.mask_drafts.MaskDrafts`.
    """

    consistency_weight: float = 1.0
    """λ; 0 leaves the consistency term out of the loss."""

    def __post_init__(self) -> None:
        weight = self.consistency_weight
        if not (is_finite_number(weight) and weight >= 0):
            raise ValueError(
                f"MaskEmbeddings: consistency_weight is {weight!r}; accepted: a number of at least 0"
            )

    @property
    def term_names(self) -> tuple[str, ...]:
        """Both cross-entropies, and the consistency."""
        return ("base_head_loss", "sampler_loss", "consistency")

    def problems(self, adapter: AdapterConfig, longest: int) -> list[str]:
        """Refuse fewer mask embeddings than rows of a block."""
        masks = getattr(adapter.gate, "mask_embeddings", 0)  # the gate may be an unknown name
        if not isinstance(masks, int) or masks >= longest:  # problems of the gate report another type
            return []
        return [
            f"adapter.gate.mask_embeddings: {masks}, but SelfDraft with form MaskEmbeddings has blocks of "
            f"{longest} rows, each of which reads one; accepted: at least {longest}"
        ]

    def check(self, model: PreTrainedModel, *, in_head: bool) -> None:
        """Refuse models without mask embeddings, and models that change what their head computes."""
        if not isinstance(getattr(model, MASK_DRAFTS, None), MaskDrafts):
            raise ConfigError(
                "adapter.gate.mask_embeddings: 0, but draft rows of SelfDraft with form MaskEmbeddings read "
                "them; accepted: at least the rows of a block"
            )
        if not in_head:
            raise ConfigError(
                f"backbone.id: {type(model).__name__} changes what its output head computes (a soft cap or a "
                "scale), or has a trainable one; accepted with SelfDraft's form MaskEmbeddings: a plain "
                "frozen head, or form RandomIds"
            )

    def terms(
        self, model: PreTrainedModel, batch: Batch, layout: DraftLayout, *, in_head: bool
    ) -> dict[str, DraftTerm]:
        """Sum the three terms."""
        rows = _run(model, batch, layout)
        return {
            "base_head_loss": DraftTerm(_cross_entropy(model, rows.latents, rows.labels), 1.0),
            "sampler_loss": DraftTerm(_cross_entropy(model, rows.sampled, rows.labels), 1.0),
            "consistency": DraftTerm(_consistency(rows.latents, rows.expected), self.consistency_weight),
        }

    def measure(
        self, model: PreTrainedModel, batch: Batch, layout: DraftLayout, *, in_head: bool
    ) -> DraftMeasures:
        """Compare the drafts of the sampler head, given the text before, with the clean rows."""
        rows, head = _run(model, batch, layout), model.get_output_embeddings()
        loss = (
            _cross_entropy(model, rows.latents, rows.labels)
            + _cross_entropy(model, rows.sampled, rows.labels)
            + self.consistency_weight * _consistency(rows.latents, rows.expected)
        )
        return DraftMeasures(loss, compare_hidden(rows.sampled, rows.expected, head.weight, head.bias))


def _run(model: PreTrainedModel, batch: Batch, layout: DraftLayout) -> _Rows:
    mask_drafts = cast(MaskDrafts, getattr(model, MASK_DRAFTS))
    ids, columns = batch["input_ids"], layout.columns
    cache, expected = clean_rows(model, batch, layout, hidden=True)
    depths = layout.depths.clamp(1, len(mask_drafts.embeddings))  # of padding, it is any number
    with mask_drafts.on_last_rows(model, depths):
        latents = draft_rows(model, batch, layout, torch.zeros_like(columns), cache, lambda hidden: hidden)
    latents = latents.squeeze(0)
    before = ids.gather(1, columns.to(ids.device))[layout.is_draft]  # (n,)
    previous = model.get_input_embeddings()(before)
    labels = shift_labels(batch["labels"]).gather(1, columns)[layout.is_draft]
    return _Rows(latents, expected.detach(), mask_drafts.sampler(previous, latents), labels)


def _cross_entropy(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum ``−log p(label)`` over the supervised rows."""
    head, known = model.get_output_embeddings(), labels != IGNORE_INDEX
    return linear_cross_entropy(hidden[known], head.weight, head.bias, labels[known].to(hidden.device))


def _consistency(latents: Tensor, expected: Tensor) -> Tensor:
    """Sum ``‖z_t − z‖² / width``, in fp32 or wider."""
    wide = torch.promote_types(latents.dtype, torch.float32)
    return (expected.to(wide) - latents.to(wide)).square().mean(1).sum()
