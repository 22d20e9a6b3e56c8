"""Forward passes that verify drafts and make new ones."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gatera_lightning.adapters.draft_adapter import DraftAdapter
from gatera_lightning.generation.drafting.config import DraftConfig
from gatera_lightning.generation.drafting.proposers import proposer_for


class DraftPasses:
    """Runs a model whose last rows are noise: random tokens or mask embeddings, which propose drafts.

    The draft adapter acts on the noise only, so all other rows have the model's own logits.

    Args:
        model: The model, in eval mode.
        adapter: Its draft adapter.
        config: How to draft.

    Attributes:
        proposer: Chooses drafts from what the noise computes.
    """

    def __init__(self, model: PreTrainedModel, adapter: DraftAdapter, config: DraftConfig) -> None:
        self.proposer = proposer_for(model, adapter)
        self._model, self._adapter, self._config = model, adapter, config

    def noise_rows(self, *, drafts: int, useful: int) -> int:
        """Return how many drafts a pass makes.

        Args:
            drafts: How many it verifies.
            useful: How many there is room for in the answer.
        """
        if drafts and self._config.cycle == "two_forwards":
            return 0
        return max(0, min(self._config.block - 1, useful))

    def noise_tokens(self, count: int) -> list[int]:
        """Return token ids of the noise of a sequence."""
        return self.proposer.token_ids(count)

    def run(
        self, ids: Tensor, *, rows: int, noise: int, cache: DynamicCache, **inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            ids: Tokens that the cache does not hold, drafts, and noise, (batch, tokens).
            rows: How many rows are read: those that verify, and the noise.
            noise: How many of them are noise.
            cache: Keys and values of the tokens before.
            inputs: Further arguments of the model.

        Returns:
            The logits of the rows that verify, (batch, rows - noise, vocabulary), and what the noise
            computes, (batch, noise, size).
        """
        keeps: Any = self._model._supports_logits_to_keep
        keep = {"logits_to_keep": rows} if keeps() else {}

        def logits() -> Tensor:
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs, **keep)
            found: Tensor = output.logits
            return found

        with self._adapter.on_last(noise, (ids.shape[0], ids.shape[1])):
            return self.proposer.read(logits, rows=rows, drafts=noise)
