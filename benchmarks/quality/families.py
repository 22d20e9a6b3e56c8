"""The families of tasks: which rows are trained on, which choose the learning rate, which are tested."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.harness.fitting import CONVAI2, arc_data
from benchmarks.quality.prose import ProseDataModule
from gatera_lightning.datamodules import Batch, DialogueDataModule, MathDataModule, SupervisedDataModule
from gatera_lightning.datamodules.batching.datasets import TokenTable


@dataclass(frozen=True)
class Family:
    """A family of tasks, and how much of it a run reads."""

    name: str

    title: str

    data: Callable[[], SupervisedDataModule]
    """Builds its data module."""

    max_length: int
    """Only rows with at most this many tokens, prompt and answer, are used: they make a run short."""

    batch_size: int
    """Rows of an optimizer step; 0 for text that is not trained on."""

    validation_rows: int
    """Rows that choose the learning rate."""

    test_rows: int
    """Rows that the trained model is tested on."""

    retention_rows: int
    """Of the test rows, the first ones measure what models of other families forget."""

    probe_rows: int
    """Of the test rows, the first ones are measured during training too, for the trajectory."""

    has_candidates: bool = False
    """Whether a row has wrong candidates, so that an accuracy is measured."""

    @property
    def is_trained_on(self) -> bool:
        """Whether runs train on it; else it only shows what they forget."""
        return self.batch_size > 0


def _commonsense() -> SupervisedDataModule:
    tests = ["ARC-Easy[:300]", "ARC-Challenge[:300]", "openbookqa"]
    return arc_data(validation=600, test=tests)


def _math() -> SupervisedDataModule:
    return MathDataModule(
        template="plain",
        answer_style="gsm8k",
        train_on="response",
        data_dir="$GATERA_DATA/math",
        train=["gsm8k"],
        validation=800,
        test=["gsm8k"],
        max_length=512,
    )


def _dialogue() -> SupervisedDataModule:
    return DialogueDataModule(
        template="plain",
        train_on="response",
        split_by="persona",
        max_history_turns=0,
        train=[f"{CONVAI2}[:54]"],
        validation=[f"{CONVAI2}[54:61]"],
        test=[f"{CONVAI2}[61:]"],
        max_length=256,
    )


def _prose() -> SupervisedDataModule:
    return ProseDataModule(
        template="plain",
        train_on="response",
        data_dir="$GATERA_DATA/commonsense",
        test=["hellaswag"],
    )


MEASURED = {
    family.name: family
    for family in (
        Family(
            "commonsense",
            "ARC and OpenBookQA",
            _commonsense,
            max_length=36,
            batch_size=8,
            validation_rows=64,
            test_rows=96,
            retention_rows=48,
            probe_rows=24,
            has_candidates=True,
        ),
        Family(
            "math",
            "GSM8K",
            _math,
            max_length=96,
            batch_size=3,
            validation_rows=32,
            test_rows=48,
            retention_rows=12,
            probe_rows=6,
        ),
        Family(
            "dialogue",
            "ConvAI2",
            _dialogue,
            max_length=96,
            batch_size=3,
            validation_rows=48,
            test_rows=64,
            retention_rows=20,
            probe_rows=10,
        ),
        Family(
            "prose",
            "HellaSwag as prose",
            _prose,
            max_length=56,
            batch_size=0,
            validation_rows=0,
            test_rows=16,
            retention_rows=16,
            probe_rows=8,
        ),
    )
}
"""Name -> family; losses are measured on all of them."""

FAMILIES = {name: family for name, family in MEASURED.items() if family.is_trained_on}
"""The families that are trained on, in the order in which they are run."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a tokenized split, in a fixed order."""

    table: TokenTable

    indices: tuple[int, ...]

    def first(self, count: int) -> "Rows":
        """Return the first rows."""
        return Rows(self.table, self.indices[:count])

    def question_keys(self) -> list[str]:
        """Return what identifies each row, whatever the template."""
        return [self.table.examples[index]["key"] for index in self.indices]

    def packed(self, positions: list[int]) -> Batch:
        """Return rows with their correct answer in packed sequences without padding, not in their order.

        Args:
            positions: Which of these rows.
        """
        indices = [self.indices[position] for position in positions]
        total = sum(self.length(position) for position in positions)
        return self.table.batch(indices, "response", all_candidates=False, pack_length=total)

    def padded(self, positions: list[int], *, candidates: bool) -> Batch:
        """Return rows in their order, with their correct answer or with all candidates.

        Args:
            positions: Which of these rows.
            candidates: Whether to include all candidates.
        """
        indices = [self.indices[position] for position in positions]
        return self.table.batch(indices, "response", all_candidates=candidates)

    def length(self, position: int) -> int:
        """Return the tokens of a row with its correct answer."""
        row = self.table.examples[self.indices[position]]
        return len(row["prompt"]) + len(row["answers"][row["gold"]])

    def by_length(self, count: int) -> list[list[int]]:
        """Return positions of ``count`` rows each, of similar length."""
        order = sorted(range(len(self.indices)), key=self.length)
        return [order[start : start + count] for start in range(0, len(order), count)]


@dataclass(frozen=True)
class FamilyRows:
    """The rows of a family; no two of the three share a question."""

    train: Rows

    validation: Rows

    test: Rows

    def batches(self, steps: int, batch_size: int, seed: int) -> list[Batch]:
        """Return the batches of a run, the same for every method; a longer run starts with the same ones.

        Args:
            steps: Optimizer steps.
            batch_size: Rows of a step.
            seed: Draws the rows and their order.
        """
        order = np.random.default_rng(seed).permutation(len(self.train.indices)).tolist()
        if steps * batch_size > len(order):
            raise ValueError(
                f"{steps} steps of {batch_size} rows, but there are {len(order)} rows to train on"
            )
        return [
            self.train.packed(order[step * batch_size : (step + 1) * batch_size]) for step in range(steps)
        ]


def load_rows(family: Family, tokenizer: PreTrainedTokenizerBase) -> FamilyRows:
    """Tokenize a family and choose its rows; the choice depends on nothing but the data.

    Raises:
        ValueError: If there are fewer rows than a run needs.
    """
    data = family.data()
    data.connect(tokenizer)
    if family.is_trained_on:
        data.setup("fit")
    data.setup("test")
    wanted = {"test": family.test_rows, "validation": family.validation_rows, "train": None}
    taken: set[str] = set()  # questions that later splits must not repeat
    found: dict[str, Rows] = {}
    for split, count in wanted.items():
        if not family.is_trained_on and split != "test":
            found[split] = found["test"].first(0)
            continue
        table = data.token_table(split)
        order = np.random.default_rng(0).permutation(len(table.examples)).tolist()
        chosen: list[int] = []
        keys: set[str] = set()
        columns = table.examples.select_columns(["prompt", "answers", "gold", "request_key"])[:]
        for index in order:
            key = columns["request_key"][index]
            answer = columns["answers"][index][columns["gold"][index]]
            if len(columns["prompt"][index]) + len(answer) > family.max_length or key in taken or key in keys:
                continue
            chosen.append(index)
            keys.add(key)
            if len(chosen) == count:
                break
        if count is not None and len(chosen) < count:
            raise ValueError(f"{family.name}: {len(chosen)} {split} rows of the {count} that a run needs")
        taken |= keys
        found[split] = Rows(table, tuple(chosen))
    return FamilyRows(**found)
