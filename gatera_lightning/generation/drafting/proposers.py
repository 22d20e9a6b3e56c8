"""What draft rows hold in decoding, and how drafts are chosen from what they compute."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatera_lightning.adapters.draft_adapter import DraftAdapter
from gatera_lightning.adapters.mask_drafts import MaskDrafts
from gatera_lightning.generation.drafting.verification import Draft, Verifier


class DraftProposer(Protocol):
    """Chooses the ids of draft rows, and drafts from what these rows compute."""

    def token_ids(self, count: int) -> list[int]:
        """Return the token ids of some draft rows."""

    def read(self, run: Callable[[], Tensor], *, rows: int, drafts: int) -> tuple[Tensor, Tensor]:
        """Run a forward pass whose last rows are draft rows.

        Args:
            run: Runs the model, and returns its logits of at least the last rows, (batch, …, vocabulary).
            rows: How many rows are read: those that verify, and the draft rows.
            drafts: How many of them are draft rows.

        Returns:
            The logits of the rows that verify, (batch, rows - drafts, vocabulary), and what :meth:`propose`
            needs of the draft rows, (batch, drafts, size).
        """

    def propose(self, verifier: Verifier, outputs: Tensor, previous: int) -> list[Draft]:
        """Choose the drafts of a block.

        Args:
            verifier: Chooses a draft from logits.
            outputs: What :meth:`read` returned of the draft rows of one sequence, (drafts, size).
            previous: The token before the first draft.
        """


class RandomIdProposer:
    """Draft rows hold random tokens, and each row's logits choose its draft (UNO, arXiv 2609.04010).

    Args:
        vocabulary: Number of token ids.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._generator = torch.Generator().manual_seed(0)  # not the generator that samples tokens

    def token_ids(self, count: int) -> list[int]:
        """Draw random token ids."""
        found: list[int] = torch.randint(self._vocabulary, (count,), generator=self._generator).tolist()
        return found

    def read(self, run: Callable[[], Tensor], *, rows: int, drafts: int) -> tuple[Tensor, Tensor]:
        """Return the logits of the rows that verify, and of the draft rows."""
        logits = run()[:, -rows:]
        return logits[:, : rows - drafts], logits[:, rows - drafts :]

    def propose(self, verifier: Verifier, outputs: Tensor, previous: int) -> list[Draft]:
        """Choose each draft from its row's logits; they do not depend on each other."""
        return verifier.propose(outputs)


class MaskEmbeddingProposer:
    """Draft rows read mask embeddings, and a sampler head chooses the drafts one after another.

    It knows the draft before (Samragh et al., arXiv 2507.11851).

    Args:
        model: The model to draft for.
        mask_drafts: The sampler head.
    """

    def __init__(self, model: PreTrainedModel, mask_drafts: MaskDrafts) -> None:
        self._embed, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._mask_drafts = mask_drafts

    def token_ids(self, count: int) -> list[int]:
        """Return ids for which the draft adapter substitutes mask embeddings."""
        return [0] * count

    def read(self, run: Callable[[], Tensor], *, rows: int, drafts: int) -> tuple[Tensor, Tensor]:
        """Return the logits of the rows that verify, and the latents of the draft rows.

        The output head does not see the draft rows: the sampler head will have to call it for each of them.
        """
        latents: list[Tensor] = []

        def split(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, *rest = args  # (batch, at least the rows, width)
            clean = hidden.shape[1] - drafts
            latents.append(hidden[:, clean:])
            return hidden[:, :clean], *rest

        hook = self._head.register_forward_pre_hook(split)
        try:
            logits = run()
        finally:
            hook.remove()
        return logits[:, drafts - rows :], latents[0]

    def propose(self, verifier: Verifier, outputs: Tensor, previous: int) -> list[Draft]:
        """Choose the drafts one after another, each from its row's latent and the token before."""
        drafts: list[Draft] = []
        for latent in outputs.unsqueeze(1):  # (1, width)
            embedding = self._embed(torch.tensor([previous], device=latent.device))  # (1, width)
            drafts += verifier.propose(self._head(self._mask_drafts.sampler(embedding, latent)))
            previous = drafts[-1].token
        return drafts


def proposer_for(model: PreTrainedModel, adapter: DraftAdapter) -> DraftProposer:
    """Return what drafts for a model with an adapter."""
    if adapter.mask_drafts is None:
        return RandomIdProposer(model.config.get_text_config().vocab_size)
    return MaskEmbeddingProposer(model, adapter.mask_drafts)
