"""Completing prompts with a model that has gated layers: Hugging Face's decoding over the adapted backbone."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from gatera_lightning.adapters.config import threshold_problems
from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.datamodules.batch import PromptBatch


@dataclass
class DecodingConfig:
    """How answers are generated; always the most likely ones, never sampled."""

    beams: int = 1
    """1 is greedy; the papers report 4."""

    max_new_tokens: int = 16
    """Tokens after which an answer is cut."""

    length_penalty: float = 1.0
    """Beams compete by their log-likelihood over their length to this power: less than 1 favours short answers."""

    no_repeat_ngram_size: int = 0
    """Never write so many tokens in a row a second time, those of the prompt included; 0 forbids nothing."""

    use_cache: bool = True
    """Keep keys and values of earlier tokens. Without it the same answers cost more time and less memory."""

    prepared: bool = True
    """Keep HiRA's W0 ⊙ BA while generating: the same answers in less time, for the memory of the adapted weights once more."""

    skip_below: float = 0.0
    """Tokens with a gate below this read the frozen weight alone: faster, and not quite the same numbers; 0 is exact."""

    merge_above: float = 1.0
    """Tokens with a gate above this read the merged weight alone; 1 is exact."""

    def problems(self) -> list[str]:
        """Everything about these values that cannot work; empty when all is well."""
        found = [
            f"decoding.{name}: {getattr(self, name)}; accepted: an integer of at least 1"
            for name in ("beams", "max_new_tokens")
            if getattr(self, name) < 1
        ]
        if self.no_repeat_ngram_size < 0:
            found.append(
                f"decoding.no_repeat_ngram_size: {self.no_repeat_ngram_size}; accepted: an integer of at least 0"
            )
        if not math.isfinite(self.length_penalty) or (self.beams == 1 and self.length_penalty != 1):
            found.append(
                f"decoding.length_penalty: {self.length_penalty}, with beams {self.beams}; accepted: a number, with 1 beam: 1"
            )
        of_thresholds = threshold_problems(self.skip_below, self.merge_above)
        found += [f"decoding.{problem}" for problem in of_thresholds]
        if not of_thresholds and not self.prepared and self.tells_tokens_apart:
            found.append(
                "decoding.prepared: false, with skip_below or merge_above; accepted: true, or thresholds of 0 and 1"
            )
        return found

    @property
    def tells_tokens_apart(self) -> bool:
        """Whether a token with a decided gate reads one weight in place of two."""
        return (self.skip_below, self.merge_above) != (0.0, 1.0)


@dataclass(frozen=True)
class Sampling:
    """Draw each token instead of taking the most likely one."""

    temperature: float = 1.0
    top_p: float = 1.0
    """Draw among the most likely tokens that have this probability together."""


def end_tokens(model: PreTrainedModel, eos_id: int) -> list[int]:
    """The tokens that end an answer: the one that does in training, and those that the model's publisher names."""
    own = getattr(model.generation_config, "eos_token_id", None)  # an instruct model may name several
    return sorted({eos_id, *([own] if isinstance(own, int) else own or [])})


def generate(
    model: PreTrainedModel,
    batch: PromptBatch,
    config: DecodingConfig,
    *,
    in_step: bool = False,
    sampling: Sampling | None = None,
    streamer: BaseStreamer | None = None,
) -> Tensor:
    """Token ids (batch, new tokens) that follow each prompt, padded behind the token that ends an answer.

    ``in_step`` makes every process run equally many forwards, without which a sharded model waits for ever. ``streamer`` is
    given the tokens of a single row as they are chosen.
    """
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    settings = GenerationConfig(
        num_beams=config.beams,
        max_new_tokens=config.max_new_tokens,
        length_penalty=config.length_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        use_cache=config.use_cache,
        eos_token_id=end_tokens(model, batch["eos_id"]),
        pad_token_id=batch["pad_id"],
        **drawn,
    )
    # What settings leave open, Transformers takes from the model: penalties and bans that its publisher recommends for chats.
    published, model.generation_config = model.generation_config, GenerationConfig()
    try:
        thresholds = {"skip_below": config.skip_below, "merge_above": config.merge_above}
        prepared = prepared_for_inference(model, **thresholds) if config.prepared else nullcontext()
        with torch.no_grad(), prepared:
            ids = model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=settings,
                synced_gpus=in_step,
                streamer=streamer,
            )
    finally:
        model.generation_config = published
    return ids[:, batch["input_ids"].shape[1] :]
