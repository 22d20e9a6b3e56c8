"""Decode completions of prompts with an adapted model, by ``generate`` of Transformers."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from gatera_lightning.adapters.gates import threshold_problems
from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.datamodules.batch import PromptBatch
from gatera_lightning.errors import type_problems


@dataclass
class DecodingConfig:
    """How answers are generated: by greedy or beam search, never by sampling."""

    beams: int = 1
    """Number of beams; 1 is greedy decoding. More beams find more likely answers and cost about as many times
    the memory and compute. The papers use 4."""

    max_new_tokens: int = 16
    """Maximum number of tokens per answer. Longer answers are cut off and usually count as wrong."""

    length_penalty: float = 1.0
    """Beams are ranked by their log-likelihood divided by (length ** length_penalty): values below 1 favor
    shorter answers, values above 1 longer ones. Requires more than 1 beam."""

    no_repeat_ngram_size: int = 0
    """Never generate an n-gram of this size that already occurred in the prompt or the answer; 0 allows
    repetition. It stops loops, but also forbids repeating phrases of the prompt."""

    use_cache: bool = True
    """Cache the keys and values of earlier tokens. Without the cache, answers are the same, memory is lower,
    and every token costs a forward pass over the whole text."""

    prepared: bool = True
    """Cache what the update needs for every token (W0 ⊙ BA for hira) while generating. Answers are the same
    and generation is faster, but the adapted weights take their memory twice."""

    skip_below: float = 0.0
    """Treat gate values below this threshold as 0, so that those tokens read the frozen weight only. Faster,
    but not exact; 0 is exact."""

    merge_above: float = 1.0
    """Treat gate values above this threshold as 1, so that those tokens read the merged weight only. Faster,
    but not exact; 1 is exact."""

    def problems(self) -> list[str]:
        """Describe every value that is not valid; empty if all are."""
        found = type_problems("decoding", self)
        for name, least in (("beams", 1), ("max_new_tokens", 1), ("no_repeat_ngram_size", 0)):
            if name not in found and getattr(self, name) < least:
                value = getattr(self, name)
                found[name] = f"decoding.{name}: {value}; accepted: an integer of at least {least}"
        if "length_penalty" not in found and self.beams == 1 and self.length_penalty != 1:
            found["length_penalty"] = (
                f"decoding.length_penalty: {self.length_penalty}, with beams 1; "
                "accepted: 1, or more than 1 beam"
            )
        if found.keys() & {"skip_below", "merge_above"}:
            return list(found.values())
        thresholds = threshold_problems(self.skip_below, self.merge_above)
        if not thresholds and self.prepared is False and self.uses_gate_thresholds:
            found["prepared"] = (
                f"decoding.prepared: false, with skip_below {self.skip_below} and "
                f"merge_above {self.merge_above}; accepted: true, or skip_below 0 and merge_above 1"
            )
        return [*found.values(), *(f"decoding.{problem}" for problem in thresholds)]

    @property
    def uses_gate_thresholds(self) -> bool:
        """Whether gates beyond a threshold count as 0 or 1."""
        return (self.skip_below, self.merge_above) != (0.0, 1.0)


@dataclass(frozen=True)
class Sampling:
    """Sample each token instead of taking the most likely one.

    Attributes:
        temperature: Divides the logits; below 1 the distribution is sharper, above 1 flatter.
        top_p: Sample from the smallest set of most likely tokens whose probabilities sum to at least this.
    """

    temperature: float = 1.0
    top_p: float = 1.0


def end_tokens(model: PreTrainedModel, eos_id: int) -> list[int]:
    """Ids of the tokens that end an answer.

    Args:
        model: A model whose generation config may name further end tokens, as instruct models do.
        eos_id: The token that ends every answer in training.
    """
    own = getattr(model.generation_config, "eos_token_id", None)  # None, an id, or a list of ids
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
    """Generate a completion of each prompt.

    Settings that ``config`` does not have are off, whatever the model's own generation config recommends.

    Args:
        model: The adapted model.
        batch: Left-padded prompts.
        config: How to decode.
        in_step: Run the same number of forward passes on every rank. Sharded models need this, or ranks that
            finish earlier leave the others waiting forever.
        sampling: Sample instead of taking the most likely tokens.
        streamer: Receives the tokens of a single prompt as they are chosen.

    Returns:
        The generated token ids, (batch, new tokens), padded after the token that ends an answer.
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
    # Transformers fills settings that are not given from the model's own generation config, such as the
    # penalties and banned tokens that its publisher recommends for chats.
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
