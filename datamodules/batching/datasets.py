"""Batches from a token table: micro-batches to train on, candidates to score, prompts to complete."""

import hashlib
import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import datasets
from torch.utils.data import Dataset

from gatera_lightning.datamodules.batch import Batch, PromptBatch
from gatera_lightning.datamodules.batching.batch_schedule import (
    OptimizerStep,
    batch_size_problems,
    build_batch_schedule,
    shard_evaluation_batches,
)
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate, collate_prompts
from gatera_lightning.datamodules.batching.packing import pack_sequences
from gatera_lightning.datamodules.batching.statistics import gold_lengths, supervised_token_counts
from gatera_lightning.datamodules.tokenization.loss_mask import TrainOn
from gatera_lightning.errors import ConfigError


@dataclass(frozen=True)
class TokenTable:
    """The tokenized examples of a split and the two token ids that collating needs.

    Loader workers receive a copy, so it holds nothing else.
    """

    examples: datasets.Dataset
    """One row per example, from :func:`~gatera_lightning.datamodules.tokenization.cache.tokenize_split`."""

    pad_id: int
    """Id of the padding token."""

    eos_id: int
    """Id of the token that ends an answer."""

    def batch(
        self,
        indices: Sequence[int],
        train_on: TrainOn,
        *,
        all_candidates: bool,
        pack_length: int | None = None,
    ) -> Batch:
        """Collate examples with their correct answer or with all candidates.

        Args:
            indices: The examples; none gives a batch of one dummy example.
            train_on: Which tokens are supervised.
            all_candidates: Whether to include every candidate of each example.
            pack_length: Pack the sequences into rows of at most this many tokens; None to pad each one.
        """
        sequences = []
        for index in indices or [0]:
            entry = self.examples[index]
            candidates = range(len(entry["answers"])) if all_candidates and indices else [entry["gold"]]
            for answer in candidates:
                sequences.append(
                    TokenSequence(
                        entry["prompt"],
                        entry["answers"][answer],
                        example_id=entry["example"] if indices else -1,
                        answer=answer,
                        gold=entry["gold"],
                        characters=entry["characters"][answer],
                        earlier_responses=entry["earlier_responses"],
                    )
                )
        packs = (
            None
            if pack_length is None
            else pack_sequences([sequence.length for sequence in sequences], pack_length)
        )
        return collate(
            sequences,
            pad_id=self.pad_id,
            train_on=train_on,
            all_candidates_present=all_candidates,
            packs=packs,
        )

    def prompts(self, indices: Sequence[int]) -> PromptBatch:
        """Collate the prompts of examples for generation; no indices give a batch of one dummy example."""
        entries = [self.examples[index] for index in indices or [0]]
        return collate_prompts(
            [entry["prompt"] for entry in entries],
            [entry["example"] if indices else -1 for entry in entries],
            pad_id=self.pad_id,
            eos_id=self.eos_id,
        )


class TrainingBatches(Dataset[Batch]):
    """The micro-batches of one rank: item ``step * accumulate + k`` is its ``k``-th one of an optimizer step.

    Args:
        table: The training split.
        steps: The batch schedule, with ``accumulate * ranks`` micro-batches per step.
        train_on: Which tokens are supervised.
        ranks: Number of ranks.
        rank: This rank.
        pack_length: Pack sequences into rows of at most this many tokens; None to pad each one.
    """

    def __init__(
        self,
        table: TokenTable,
        steps: list[OptimizerStep],
        train_on: TrainOn,
        *,
        ranks: int,
        rank: int,
        pack_length: int | None = None,
    ) -> None:
        self.table = table
        self.steps = steps
        self.train_on: TrainOn = train_on
        self.ranks = ranks
        self.rank = rank
        self.pack_length = pack_length
        self.accumulate = len(steps[0].micro_batches) // ranks

    @classmethod
    def schedule(
        cls,
        table: TokenTable,
        train_on: TrainOn,
        *,
        batch_size: int,
        accumulate: int,
        ranks: int,
        rank: int,
        seed: int,
        token_budget: int | None = None,
        group_by_length: bool = True,
        pack_length: int | None = None,
    ) -> Self:
        """Build the batch schedule of a training split; see :func:`build_batch_schedule` for its arguments.

        Raises:
            ConfigError: There are fewer examples per step, or in total, than micro-batches per step.
        """
        if problems := batch_size_problems(batch_size, accumulate, ranks):
            raise ConfigError(problems)
        try:
            steps = build_batch_schedule(
                gold_lengths(table.examples),
                supervised_token_counts(table.examples, train_on),
                batch_size=batch_size,
                micro_batches=accumulate * ranks,
                seed=seed,
                token_budget=token_budget,
                group_by_length=group_by_length,
            )
        except ValueError as error:
            raise ConfigError(f"data.train: {error}") from error
        return cls(table, steps, train_on, ranks=ranks, rank=rank, pack_length=pack_length)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of which questions form which step, independent of micro-batches and ranks."""
        keys = self.table.examples["key"]
        steps = [
            sorted(keys[i] for micro_batch in step.micro_batches for i in micro_batch) for step in self.steps
        ]
        return hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __getitem__(self, index: int) -> Batch:
        step = self.steps[index // self.accumulate]
        indices = step.micro_batches[(index % self.accumulate) * self.ranks + self.rank]
        batch = self.table.batch(indices, self.train_on, all_candidates=False, pack_length=self.pack_length)
        batch["step_supervised_tokens"], batch["step_tokens"] = step.supervised_tokens, step.tokens
        return batch


@dataclass(frozen=True)
class LikelihoodBatches(Dataset[Batch]):
    """The evaluation batches of one rank, each example with its correct answer or with all candidates."""

    table: TokenTable
    batches: list[list[int]]
    train_on: TrainOn
    all_candidates: bool

    @classmethod
    def shard(
        cls,
        table: TokenTable,
        train_on: TrainOn,
        *,
        all_candidates: bool,
        batch_size: int,
        ranks: int,
        rank: int,
        done: Container[int] = frozenset(),
    ) -> Self:
        """Form the batches of one rank.

        Args:
            table: The split.
            train_on: Which tokens are scored.
            all_candidates: Whether to include every candidate of each example.
            batch_size: Maximum number of sequences per batch.
            ranks: Number of ranks.
            rank: This rank.
            done: Indices of examples that were evaluated before.
        """
        candidate_lengths = _candidate_lengths(table, all_candidates)
        most_candidates = max(map(len, candidate_lengths))
        batches = shard_evaluation_batches(
            [max(lengths) for lengths in candidate_lengths],
            max(1, batch_size // most_candidates),
            ranks,
            rank,
            done,
        )
        return cls(table, batches, train_on, all_candidates)

    def row_lengths(self) -> list[list[int]]:
        """Return the tokens of each row of each batch."""
        lengths = _candidate_lengths(self.table, self.all_candidates)
        return [[length for index in batch for length in lengths[index]] for batch in self.batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.table.batch(self.batches[index], self.train_on, all_candidates=self.all_candidates)


@dataclass(frozen=True)
class PromptBatches(Dataset[PromptBatch]):
    """The evaluation batches of one rank, as prompts to generate from."""

    table: TokenTable
    batches: list[list[int]]

    @classmethod
    def shard(
        cls, table: TokenTable, *, batch_size: int, ranks: int, rank: int, done: Container[int] = frozenset()
    ) -> Self:
        """Form the batches of one rank; the arguments are those of :meth:`LikelihoodBatches.shard`."""
        lengths = [len(ids) for ids in table.examples["prompt"]]
        return cls(table, shard_evaluation_batches(lengths, batch_size, ranks, rank, done))

    def row_lengths(self) -> list[list[int]]:
        """Return the tokens of each row of each batch."""
        lengths = [len(ids) for ids in self.table.examples["prompt"]]
        return [[lengths[index] for index in batch] for batch in self.batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> PromptBatch:
        return self.table.prompts(self.batches[index])


def _candidate_lengths(table: TokenTable, all_candidates: bool) -> list[list[int]]:
    """Tokens of each example with every candidate, or with its correct answer alone."""
    if all_candidates:
        return list(table.examples["lengths"])
    return [[length] for length in gold_lengths(table.examples)]
