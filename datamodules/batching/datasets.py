"""Batches out of a token table: a planned step's micro-batches to train on, questions to rank, prompts to complete."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import datasets
from torch.utils.data import Dataset

from gatera_lightning.datamodules.batch import Batch, PromptBatch
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate, collate_prompts
from gatera_lightning.datamodules.batching.packing import packed_lines
from gatera_lightning.datamodules.batching.step_plan import Step
from gatera_lightning.datamodules.tokenization.loss_mask import TrainOn


@dataclass(frozen=True)
class TokenTable:
    """Tokenised examples, and what collating them takes. Loader workers get a copy, so it holds nothing else."""

    rows: datasets.Dataset  # columns as SupervisedDataModule tokenises them
    pad_id: int
    eos_id: int

    def batch(
        self, rows: Sequence[int], train_on: TrainOn, *, every_answer: bool, line: int | None = None
    ) -> Batch:
        """The batch of some rows, each with its right answer or with every one; no rows give one that counts for nothing.

        ``line`` packs them into lines of at most so many tokens.
        """
        answered = []
        for row in rows or [0]:
            entry = self.rows[row]
            for answer in range(len(entry["answers"])) if every_answer and rows else [entry["gold"]]:
                answered.append(
                    TokenSequence(
                        entry["prompt"],
                        entry["answers"][answer],
                        example_id=entry["example"] if rows else -1,
                        answer=answer,
                        gold=entry["gold"],
                        characters=entry["characters"][answer],
                        earlier_responses=entry["earlier_responses"],
                    )
                )
        lines = None if line is None else packed_lines([row.length for row in answered], line)
        return collate(
            answered, pad_id=self.pad_id, train_on=train_on, all_candidates_present=every_answer, packs=lines
        )

    def prompts(self, rows: Sequence[int]) -> PromptBatch:
        """The prompts of some rows; no rows give one that counts for nothing."""
        entries = [self.rows[row] for row in rows or [0]]
        ids = [entry["example"] if rows else -1 for entry in entries]
        return collate_prompts(
            [entry["prompt"] for entry in entries], ids, pad_id=self.pad_id, eos_id=self.eos_id
        )


class TrainingBatches(Dataset[Batch]):
    """Item ``step · accumulate + k``: this rank's share of micro-batch ``k`` of a planned step, with the step's totals.

    ``line`` packs its rows into lines of at most so many tokens.
    """

    def __init__(
        self,
        table: TokenTable,
        steps: list[Step],
        train_on: TrainOn,
        *,
        ranks: int,
        rank: int,
        line: int | None = None,
    ) -> None:
        self.table = table
        self.steps = steps
        self.train_on: TrainOn = train_on
        self.ranks = ranks
        self.rank = rank
        self.line = line
        self.accumulate = len(steps[0].micro_batches) // ranks

    @cached_property
    def plan(self) -> str:
        """16 hex digits of which questions form which step, however each is cut up and shared out."""
        keys = self.table.rows["key"]
        steps = [sorted(keys[row] for rows in step.micro_batches for row in rows) for step in self.steps]
        return hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __getitem__(self, index: int) -> Batch:
        step = self.steps[index // self.accumulate]
        rows = step.micro_batches[(index % self.accumulate) * self.ranks + self.rank]
        batch = self.table.batch(rows, self.train_on, every_answer=False, line=self.line)
        batch["step_supervised_tokens"], batch["step_tokens"] = step.targets, step.tokens
        return batch


@dataclass(frozen=True)
class LikelihoodBatches(Dataset[Batch]):
    """Item ``i``: the rows of this rank's evaluation batch ``i``, each with its right answer or with every one."""

    table: TokenTable
    batches: list[list[int]]
    train_on: TrainOn
    every_answer: bool

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.table.batch(self.batches[index], self.train_on, every_answer=self.every_answer)


@dataclass(frozen=True)
class PromptBatches(Dataset[PromptBatch]):
    """Item ``i``: the prompts of this rank's evaluation batch ``i``."""

    table: TokenTable
    batches: list[list[int]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> PromptBatch:
        return self.table.prompts(self.batches[index])
