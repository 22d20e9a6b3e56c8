"""Collate token sequences into padded or packed batches, and prompts into batches for generation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch, PromptBatch
from gatera_lightning.datamodules.tokenization.loss_mask import TrainOn, supervised_ranges


@dataclass(frozen=True)
class TokenSequence:
    """The tokens of a prompt and of one of its candidate answers."""

    prompt_ids: list[int]
    answer_ids: list[int]

    example_id: int = -1
    """Index of the example within its split; -1 for a dummy example."""

    answer: int = 0
    """Index of the candidate."""

    gold: int = 0
    """Index of the correct candidate."""

    characters: int = 1
    """Characters of the answer's text."""

    earlier_responses: Sequence[Sequence[int]] = ()
    """Token ranges ``(start, end)`` of earlier responses in the prompt."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def collate(
    sequences: Sequence[TokenSequence],
    *,
    pad_id: int,
    train_on: TrainOn,
    all_candidates_present: bool = False,
    packs: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Right-pad sequences into a batch whose step totals are its own.

    Labels are masked by position, never by token id: padding and EOS share an id in many tokenizers, and EOS
    is supervised. Dummy examples have no labels.

    Args:
        sequences: The sequences, one row each unless they are packed.
        pad_id: Id of the padding token.
        train_on: Which tokens are supervised.
        all_candidates_present: Value of the batch's key of that name.
        packs: Indices of the sequences in each packed row, in order.
    """
    packed = packs is not None
    packs = [[index] for index in range(len(sequences))] if packs is None else packs
    width = max(sum(sequences[index].length for index in pack) for pack in packs)
    input_ids = torch.full((len(packs), width), pad_id)
    attention_mask = torch.zeros(len(packs), width, dtype=torch.long)
    position_ids = torch.zeros(len(packs), width, dtype=torch.long)
    labels = torch.full((len(packs), width), IGNORE_INDEX)
    response_mask = torch.zeros(len(packs), width, dtype=torch.bool)
    for row, pack in enumerate(packs):
        offset = 0
        for sequence in (sequences[index] for index in pack):
            ids = torch.tensor(sequence.prompt_ids + sequence.answer_ids)
            prompt_length, length = len(sequence.prompt_ids), len(ids)
            span = slice(offset, offset + length)
            input_ids[row, span] = ids
            attention_mask[row, span] = 1
            position_ids[row, span] = torch.arange(length)
            response_mask[row, offset + prompt_length : offset + length] = True
            if sequence.example_id >= 0:
                for start, end in supervised_ranges(
                    prompt_length, length, sequence.earlier_responses, train_on
                ):
                    labels[row, offset + start : offset + end] = ids[start:end]
            offset += length
        position_ids[row, offset:] = torch.arange(width - offset)  # so that padding is a sequence of its own
    batch = Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        response_mask=response_mask,
        example_ids=torch.tensor([sequence.example_id for sequence in sequences]),
        step_supervised_tokens=int((labels != IGNORE_INDEX).sum()),
        step_tokens=int(attention_mask.sum()),
        answer_ids=torch.tensor([sequence.answer for sequence in sequences]),
        gold_ids=torch.tensor([sequence.gold for sequence in sequences]),
        answer_characters=torch.tensor([sequence.characters for sequence in sequences]),
        all_candidates_present=all_candidates_present,
    )
    if packed:
        batch["position_ids"] = position_ids
    return batch


def collate_prompts(
    prompts: Sequence[Sequence[int]], example_ids: Sequence[int], *, pad_id: int, eos_id: int
) -> PromptBatch:
    """Left-pad prompts into a batch for generation.

    Args:
        prompts: Token ids of each prompt.
        example_ids: Index of each prompt's example within its split; -1 for a dummy example.
        pad_id: Id of the padding token.
        eos_id: Id of the token that ends an answer.
    """
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    return PromptBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        example_ids=torch.tensor(example_ids),
        pad_id=pad_id,
        eos_id=eos_id,
    )
