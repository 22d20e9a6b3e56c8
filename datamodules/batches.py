"""Batches out of a token table: a planned step's micro-batches for training, (row, answer) pairs for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
from torch.utils.data import Dataset

from gatera_lightning.datamodules.plan import Step
from gatera_lightning.datamodules.tokens import AnsweredPrompt, Batch, TrainOn, collate


@dataclass(frozen=True)
class TokenTable:
    """Tokenised examples, and what collating them takes. Loader workers get a copy, so it holds nothing else."""

    rows: datasets.Dataset  # columns as SupervisedDataModule tokenises them
    task_names: list[str]
    pad_id: int

    def batch(self, pairs: Sequence[tuple[int, int]], train_on: TrainOn) -> Batch:
        """The batch of (row, answer) pairs; no pairs give one row that counts for nothing."""
        answered = []
        for row, answer in pairs or [(0, 0)]:
            entry = self.rows[row]
            answered.append(
                AnsweredPrompt(
                    entry["prompt"],
                    entry["answers"][answer],
                    example_id=entry["example"] if pairs else -1,
                    answer=answer,
                    gold=entry["gold"],
                    candidates=len(entry["answers"]),
                    task=self.task_names.index(entry["task"]),
                )
            )
        return collate(answered, pad_id=self.pad_id, train_on=train_on)


class TrainingBatches(Dataset[Batch]):
    """Item ``step · accumulate + k``: this rank's share of micro-batch ``k`` of a planned step, with the step's totals."""

    def __init__(self, table: TokenTable, steps: list[Step], train_on: TrainOn, *, ranks: int, rank: int) -> None:
        self.table = table
        self.steps = steps
        self.train_on: TrainOn = train_on
        self.ranks = ranks
        self.rank = rank
        self.accumulate = len(steps[0].micro_batches) // ranks

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __getitem__(self, index: int) -> Batch:
        step = self.steps[index // self.accumulate]
        rows = step.micro_batches[(index % self.accumulate) * self.ranks + self.rank]
        batch = self.table.batch([(row, self.table.rows[row]["gold"]) for row in rows], self.train_on)
        batch["step_targets"], batch["step_tokens"] = step.targets, step.tokens
        return batch


class EvaluationBatches(Dataset[Batch]):
    """Item ``i``: this rank's share of evaluation batch ``i``, made of (row, answer) pairs."""

    def __init__(self, table: TokenTable, batches: list[list[tuple[int, int]]], train_on: TrainOn) -> None:
        self.table = table
        self.batches = batches
        self.train_on: TrainOn = train_on

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.table.batch(self.batches[index], self.train_on)
