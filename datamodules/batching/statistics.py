"""Statistics of a split, computed from its token table: lengths, supervised tokens and padding."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from datasets import Dataset

from gatera_lightning.datamodules.batching.batch_schedule import OptimizerStep
from gatera_lightning.datamodules.batching.packing import pack_sequences
from gatera_lightning.datamodules.tokenization.loss_mask import TrainOn, supervised_ranges


@dataclass(frozen=True)
class SplitStatistics:
    """Counts over a split, each example with its correct answer."""

    tasks: dict[str, int]
    """Number of examples of each task, in order of appearance."""

    lengths: list[int]
    """Tokens of each example, in order."""

    supervised_tokens: int
    """Supervised tokens of all examples."""

    truncated: int
    """Number of truncated prompts."""

    @classmethod
    def from_table(cls, table: Dataset, train_on: TrainOn) -> Self:
        """Compute the statistics of a token table."""
        return cls(
            tasks=dict(Counter(table["task"])),
            lengths=gold_lengths(table),
            supervised_tokens=sum(supervised_token_counts(table, train_on)),
            truncated=sum(table["truncated"]),
        )

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(self.lengths)

    def length_quantile(self, q: float) -> int:
        """Return the smallest length that at least a share ``q`` of the examples do not exceed."""
        return int(np.quantile(self.lengths, q, method="inverted_cdf"))


def padding_share(batches: Iterable[Sequence[int]]) -> float:
    """Return the share of computed positions that are padding: ``1 - Σ lengths / Σ rows · longest``.

    Args:
        batches: Tokens of each row of each batch.
    """
    tokens = computed = 0
    for lengths in batches:
        tokens += sum(lengths)
        computed += len(lengths) * max(lengths)
    return 1 - tokens / computed


def scheduled_lengths(
    steps: Iterable[OptimizerStep], lengths: Sequence[int], pack_length: int | None = None
) -> list[list[int]]:
    """Return the tokens of each row of each micro-batch of a batch schedule.

    Args:
        steps: The batch schedule.
        lengths: Tokens of each example.
        pack_length: Maximum number of tokens of a packed row; None without packing.
    """
    micro_batches = [[lengths[i] for i in examples] for step in steps for examples in step.micro_batches]
    if pack_length is None:
        return micro_batches
    return [
        [sum(sequences[i] for i in pack) for pack in pack_sequences(sequences, pack_length)]
        for sequences in micro_batches
    ]


def gold_lengths(table: Dataset) -> list[int]:
    """Return the tokens of each example's prompt and correct answer."""
    return [lengths[gold] for lengths, gold in zip(table["lengths"], table["gold"], strict=True)]


def supervised_token_counts(table: Dataset, train_on: TrainOn) -> list[int]:
    """Return the supervised tokens of each example with its correct answer."""
    examples = zip(table["prompt"], gold_lengths(table), table["earlier_responses"], strict=True)
    ranges = (
        supervised_ranges(len(prompt), length, earlier_responses, train_on)
        for prompt, length, earlier_responses in examples
    )
    return [sum(end - start for start, end in found) for found in ranges]
