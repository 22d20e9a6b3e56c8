"""Answer requests of the server with drafts, unless they ask for something that drafts do not support."""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import BaseStreamer

from gatera_lightning.datamodules.batch import PromptBatch
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.generation.decoding import DecodingConfig, Sampling
from gatera_lightning.generation.drafting import Drafter

log = logging.getLogger(__name__)


def unsupported_field(config: GenerationConfig) -> str | None:
    """Name the field of a request that drafts do not support; None if there is none.

    Args:
        config: The settings of the request.
    """
    if config.repetition_penalty not in (None, 1.0):
        return "frequency_penalty"
    if config.sequence_bias is not None:
        return "logit_bias"
    # Which passes draft depends on measured times, and a pass with drafts draws other random numbers.
    return "seed" if config.do_sample and getattr(config, "seed", None) is not None else None


class DraftingModel:
    """Generates as a model of Transformers does, with drafts where they support the request.

    Args:
        model: The model.
        drafter: Its drafter.
    """

    def __init__(self, model: PreTrainedModel, drafter: Drafter) -> None:
        self._model: Any = model
        self._drafter = drafter
        self._noted: set[str] = set()

    def generate(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        generation_config: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
    ) -> Tensor:
        """Return a prompt and its answer, (1, tokens).

        Args:
            input_ids: The prompt, (1, tokens).
            attention_mask: All ones, (1, tokens).
            generation_config: The settings of the request.
            tokenizer: Finds the texts that end an answer.
            streamer: Receives the tokens as they are chosen.
            stopping_criteria: Ends the answer early.
        """
        if field := unsupported_field(generation_config):
            self._note(f"{field}: not supported with drafts; requests with it are decoded without them")
            plain: Tensor = self._model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=generation_config,
                tokenizer=tokenizer,
                streamer=streamer,
                stopping_criteria=stopping_criteria,
            )
            return plain
        stopping = StoppingCriteriaList(stopping_criteria or [])
        if generation_config.stop_strings is not None:
            stopping.append(StopStringCriteria(tokenizer, generation_config.stop_strings))
        assert generation_config.max_new_tokens is not None  # the handlers set it
        answer = self._drafter.generate(
            self._batch(input_ids, tokenizer),
            # The server prepares the model for all requests.
            DecodingConfig(max_new_tokens=generation_config.max_new_tokens, prepared=False),
            sampling=_sampling(generation_config),
            streamer=streamer,
            stopping=stopping,
        )
        for verdict in self._drafter.turned_off:
            self._note(verdict)
        if not self._drafter.turned_off:
            log.info("so far %s", self._drafter.counts)
        return torch.cat([input_ids, answer], 1)

    def _batch(self, ids: Tensor, tokenizer: Any) -> PromptBatch:
        batch = collate_prompts(
            ids.tolist(), [0], pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id
        )
        batch["input_ids"], batch["attention_mask"] = ids, torch.ones_like(ids)  # on their device
        return batch

    def _note(self, line: str) -> None:
        """Log a line, but only once."""
        if line not in self._noted:
            self._noted.add(line)
            log.warning(line)


def _sampling(config: GenerationConfig) -> Sampling | None:
    if not config.do_sample:
        return None
    top_p = 1.0 if config.top_p is None else config.top_p
    return Sampling(temperature=config.temperature or 1.0, top_p=top_p)
