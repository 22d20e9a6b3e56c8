"""Log-likelihoods of candidate answers, the prompt that a question's candidates share being computed once."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.objectives.next_token import target_positions_only


def continues_from_keys(model: PreTrainedModel) -> bool:
    """Whether all that the model keeps of a prompt is keys and values, which rows can share: no convolution, no state."""
    layers = DynamicCache(config=model.config).layers
    keys = all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in layers
    )
    return keys and not model._is_stateful  # what Transformers itself asks before it crops a cache


def candidate_log_likelihoods(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """``Σ log p`` of each candidate's tokens (batch,), and how many there are (batch,).

    A row of ``batch`` is a prompt with one of its candidates, those of a question behind each other. Two forwards, whatever
    the batch: the prompts, left padded, then every candidate upon its prompt's keys and values. A row-by-row forward gives
    the same up to rounding, for ``candidates · prompt`` more tokens a question: with ConvAI2's 20 replies six times as many.
    """
    ids, answer = batch["input_ids"], batch["response_mask"]  # (batch, tokens)
    starts = answer.int().argmax(1)  # (batch,), tokens of the prompt
    counts = answer.sum(1)  # (batch,), tokens of the answer
    examples = batch["example_ids"]
    first = torch.cat([examples.new_ones(1, dtype=torch.bool), examples[1:] != examples[:-1]])  # (batch,)
    question = first.cumsum(0) - 1  # (batch,), the row of `prompts` that a candidate belongs to

    width = max(1, int(starts.max()))
    places = (
        torch.arange(width, device=ids.device) - width + starts[first, None]
    )  # (questions, prompt tokens)
    prompts, prompt_mask = ids[first].gather(1, places.clamp(min=0)), (places >= 0).long()
    places = torch.arange(int(counts.max()), device=ids.device) + starts[:, None]  # (batch, answer tokens)
    answers = ids.gather(1, places.clamp(max=ids.shape[1] - 1))
    answer_mask = torch.arange(answers.shape[1], device=ids.device) < counts[:, None]

    last = torch.zeros_like(prompt_mask, dtype=torch.bool)
    last[:, -1] = True
    cache = DynamicCache(config=model.config)
    with target_positions_only(model, last):
        logits = model(
            input_ids=prompts,
            attention_mask=prompt_mask,
            position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        ).logits  # (1, questions, vocabulary)
    first_log_p = logits[0].float().log_softmax(-1)[question, answers[:, 0]]  # (batch,)

    cache.batch_select_indices(question)
    read = answers[
        :, : max(1, answers.shape[1] - 1)
    ]  # nothing follows the last token; one is read where there is one only
    following = F.pad(answer_mask[:, 1:], (0, read.shape[1] - answers.shape[1] + 1))  # (batch, read tokens)
    with target_positions_only(model, following):
        logits = model(
            input_ids=read,
            attention_mask=torch.cat([prompt_mask[question], answer_mask[:, : read.shape[1]].long()], 1),
            position_ids=torch.arange(read.shape[1], device=ids.device) + starts[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits  # (1, n, vocabulary)
    targets = F.pad(answers[:, 1:], (0, read.shape[1] - answers.shape[1] + 1))[following]  # (n,)
    log_p = -F.cross_entropy(logits[0].float(), targets, reduction="none")

    predicted = starts > 0  # without a prompt nothing predicts the first token
    total = torch.where(predicted, first_log_p, 0.0)
    total = total.index_add(0, following.nonzero()[:, 0], log_p)
    real = examples >= 0
    return total * real, (counts - (~predicted).long()) * real
