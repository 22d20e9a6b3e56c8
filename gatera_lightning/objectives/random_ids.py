"""Draft rows hold random token ids, and learn what the model predicts (UNO, arXiv 2609.04010)."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.objectives.draft_form import DraftForm, DraftMeasures, DraftTerm
from gatera_lightning.objectives.draft_forward import compared_predictions, summed_total_variation
from gatera_lightning.objectives.draft_layout import DraftLayout

_VALIDATION_SEED = 0


@dataclass(frozen=True)
class RandomIds(DraftForm):
    """UNO's form, whose drafts do not depend on each other; needs no labels and no further parameters.

    ::

        L = 1/N Σ_rows Σ_v |p_draft(v) − p_model(v)|

    Logged as ``train/total_variation``, ``½ Σ |p_draft − p_model|`` from 0 to 1: the share of drafts that
    decoding by sampling rejects. Random ids come from torch's generator; validation draws the same ids every
    time.
    """

    @property
    def term_names(self) -> tuple[str, ...]:
        """The total variation."""
        return ("total_variation",)

    def problems(self, adapter: AdapterConfig, longest: int) -> list[str]:
        """Refuse mask embeddings, which no draft row would read."""
        masks = getattr(adapter.gate, "mask_embeddings", 0)  # the gate may be an unknown name
        if not masks:
            return []
        return [
            f"adapter.gate.mask_embeddings: {masks!r}, but draft rows of SelfDraft hold random ids; "
            "accepted: 0, or SelfDraft with form gatera_lightning.objectives.MaskEmbeddings"
        ]

    def terms(
        self, model: PreTrainedModel, batch: Batch, layout: DraftLayout, *, in_head: bool
    ) -> dict[str, DraftTerm]:
        """Sum the total variation, which has the weight 2."""
        ids = _random_ids(model, layout)
        return {
            "total_variation": DraftTerm(
                summed_total_variation(model, batch, layout, ids, in_head=in_head), 2.0
            )
        }

    def measure(
        self, model: PreTrainedModel, batch: Batch, layout: DraftLayout, *, in_head: bool
    ) -> DraftMeasures:
        """Compare the rows with the clean ones."""
        ids = _random_ids(model, layout, torch.Generator().manual_seed(_VALIDATION_SEED))
        compared = compared_predictions(model, batch, layout, ids, in_head=in_head)
        return DraftMeasures(2 * compared[:, 0].sum(), compared)


def _random_ids(
    model: PreTrainedModel, layout: DraftLayout, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a token id for each draft row, (batch, rows), on the CPU: the same on every device."""
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    return torch.randint(vocabulary, layout.columns.shape, generator=generator)
