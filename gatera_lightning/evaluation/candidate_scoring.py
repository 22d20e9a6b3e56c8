"""Log-likelihoods of candidate answers that share the keys and values of their prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.objectives.next_token import head_only_at


def candidate_log_likelihoods(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each candidate answer, computing the prompt that candidates share only once.

    Two forward passes, whatever the batch: the left-padded prompts, then all candidates on top of the cached
    keys and values of their prompt. A forward pass over every prompt with its candidate gives the same up to
    rounding, but repeats the prompt for each candidate: six times as many tokens with the 20 replies of
    ConvAI2.

    Args:
        model: A model that passes :func:`~gatera_lightning.backbone.probes.caches_only_keys_and_values`.
        batch: Prompts with one candidate each, the candidates of one question in a row.

    Returns:
        ``Σ log p`` of the tokens of each candidate in fp32, (batch,), and their number, (batch,); both are 0
        for dummy examples. Without a prompt the first token is not counted, since nothing predicts it.
    """
    ids, response = batch["input_ids"], batch["response_mask"]  # (batch, tokens)
    prompt_lengths = response.int().argmax(1)  # (batch,)
    answer_lengths = response.sum(1)  # (batch,)
    examples = batch["example_ids"]  # (batch,)
    is_first = torch.cat([examples.new_ones(1, dtype=torch.bool), examples[1:] != examples[:-1]])  # (batch,)
    question = is_first.cumsum(0) - 1  # (batch,): index of the candidate's prompt in `prompts`

    prompts, prompt_mask = _left_padded(ids[is_first], prompt_lengths[is_first], int(prompt_lengths.max()))
    answers, answer_mask = _answers(ids, prompt_lengths, answer_lengths)
    cache = DynamicCache(config=model.config)
    first_log_p = _next_token_log_p(model, prompts, prompt_mask, cache)[question, answers[:, 0]]  # (batch,)
    cache.batch_select_indices(question)

    # Nothing follows the last token of an answer, so it is not read, unless it is the only one.
    read = answers[:, : max(1, answers.shape[1] - 1)]
    padding = (0, read.shape[1] - answers.shape[1] + 1)
    predicts = F.pad(
        answer_mask[:, 1:], padding
    )  # (batch, read tokens): positions followed by an answer token
    with head_only_at(model, predicts):
        logits = model(
            input_ids=read,
            attention_mask=torch.cat([prompt_mask[question], answer_mask[:, : read.shape[1]].long()], 1),
            position_ids=torch.arange(read.shape[1], device=ids.device) + prompt_lengths[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits  # (1, n, vocabulary)
    targets = F.pad(answers[:, 1:], padding)[predicts]  # (n,)
    log_p = -F.cross_entropy(logits[0].float(), targets, reduction="none")

    has_prompt = prompt_lengths > 0
    total = torch.where(has_prompt, first_log_p, 0.0)
    total = total.index_add(0, predicts.nonzero()[:, 0], log_p)
    is_real = examples >= 0
    return total * is_real, (answer_lengths - (~has_prompt).long()) * is_real


def _left_padded(ids: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The first ``lengths`` tokens of each row of ``ids``, left padded, and their mask."""
    width = max(1, longest)  # a model needs at least one column, also without any prompt
    columns = torch.arange(width, device=ids.device) - width + lengths[:, None]  # (rows, width)
    return ids.gather(1, columns.clamp(min=0)), (columns >= 0).long()


def _answers(ids: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """``lengths`` tokens of each row of ``ids`` from ``starts`` on, right padded, and their bool mask."""
    offsets = torch.arange(int(lengths.max()), device=ids.device)  # (answer tokens,)
    columns = offsets + starts[:, None]  # (rows, answer tokens)
    return ids.gather(1, columns.clamp(max=ids.shape[1] - 1)), offsets < lengths[:, None]


def _next_token_log_p(model: PreTrainedModel, prompts: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """``log p`` of the token after each left-padded prompt, (prompts, vocabulary); fills ``cache``."""
    last = torch.zeros_like(mask, dtype=torch.bool)
    last[:, -1] = True
    with head_only_at(model, last):
        logits = model(
            input_ids=prompts,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        ).logits  # (1, prompts, vocabulary)
    return logits[0].float().log_softmax(-1)
