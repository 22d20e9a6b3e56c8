"""Figures of a split, read off its token table: lengths, targets, and how much padding its batches compute."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from datasets import Dataset

from gatera_lightning.datamodules.batching.datasets import LikelihoodBatches, PromptBatches
from gatera_lightning.datamodules.batching.packing import packed_lines
from gatera_lightning.datamodules.batching.step_plan import Step
from gatera_lightning.datamodules.tokenization.loss_mask import TrainOn, supervised_ranges


@dataclass(frozen=True)
class SplitStatistics:
    """What a split consists of, every row with its right answer."""

    tasks: dict[str, int]  # rows of each task, in order of appearance
    lengths: list[int]  # real tokens of each row, in order
    targets: int  # tokens that carry loss, over all rows
    shortened: int  # prompts that lost their beginning to max_length

    @classmethod
    def of(cls, table: Dataset, train_on: TrainOn) -> Self:
        """The figures of a token table, tokens counted as :func:`collate` counts them."""
        lengths, targets = right_lengths(table), target_counts(table, train_on)
        return cls(
            tasks=dict(Counter(table["task"])),
            lengths=lengths,
            targets=sum(targets),
            shortened=sum(table["truncated"]),
        )

    @property
    def tokens(self) -> int:
        """Real tokens over all rows."""
        return sum(self.lengths)

    def length(self, share: float) -> int:
        """The smallest length that at least ``share`` of the rows do not exceed: 0 the shortest, 0.5 the (lower) median."""
        return int(np.quantile(self.lengths, share, method="inverted_cdf"))


def padding_share(batches: Iterable[Sequence[int]]) -> float:
    """Share of computed positions that is padding: ``1 - Σ lengths / Σ rows · longest``.

    ``batches`` holds the lengths of each batch's sequences, all of which are padded to the longest among them.
    """
    real = computed = 0
    for lengths in batches:
        real += sum(lengths)
        computed += len(lengths) * max(lengths)
    return 1 - real / computed


def planned_lengths(
    steps: Iterable[Step], lengths: Sequence[int], line: int | None = None
) -> list[list[int]]:
    """The real tokens in the lines of every micro-batch of a plan over rows of these ``lengths``.

    A row is a line of its own, or rows are packed into lines of at most ``line`` tokens.
    """
    found = [[lengths[row] for row in rows] for step in steps for rows in step.micro_batches]
    if line is None:
        return found
    return [[sum(rows[row] for row in packed) for packed in packed_lines(rows, line)] for rows in found]


def evaluation_lengths(evaluation: LikelihoodBatches | PromptBatches) -> list[list[int]]:
    """The lengths of the sequences of every evaluation batch: right answers, all candidates, or prompts alone."""
    table = evaluation.table.rows
    if isinstance(evaluation, PromptBatches):
        sequences = [[len(ids)] for ids in table["prompt"]]
    elif evaluation.every_answer:
        sequences = list(table["lengths"])
    else:
        sequences = [[length] for length in right_lengths(table)]
    return [[length for row in rows for length in sequences[row]] for rows in evaluation.batches]


def right_lengths(table: Dataset) -> list[int]:
    """Tokens of each row's prompt and right answer."""
    return [lengths[gold] for lengths, gold in zip(table["lengths"], table["gold"], strict=True)]


def target_counts(table: Dataset, train_on: TrainOn) -> list[int]:
    """Tokens that carry loss in each row, as :func:`collate` will label them."""
    rows = zip(table["prompt"], right_lengths(table), table["earlier_responses"], strict=True)
    ranges = (supervised_ranges(len(prompt), length, earlier, train_on) for prompt, length, earlier in rows)
    return [sum(end - start for start, end in found) for found in ranges]
