"""Examples of ARC-Easy, ARC-Challenge, OpenBookQA and ConvAI2 in one data module."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.harness.fitting import CONVAI2
from gatera_lightning.datamodules import (
    CommonsenseDataModule,
    DialogueDataModule,
    Example,
    SupervisedDataModule,
)

MULTIPLE_CHOICE = ("ARC-Easy", "ARC-Challenge", "openbookqa")


class MixedExamples(SupervisedDataModule):
    """The first examples of each source, a quarter each, with the prompts of the smollm2 recipes.

    The validation split is from the test files, and from other personas of ConvAI2.

    Args:
        train_examples: Number of examples to train on.
        validation_examples: Number of examples of the validation split.
        settings: Settings of every data module.
    """

    free_text = True

    def __init__(self, *, train_examples: int, validation_examples: int, **settings: Any) -> None:
        super().__init__(train_on="response", **settings)
        self.counts = {"train": train_examples, "validation": validation_examples, "test": 0}
        self.sources: list[SupervisedDataModule] = [
            CommonsenseDataModule(
                template="plain",
                answer_format="content",
                train_on="response",
                train=[f"$GATERA_DATA/commonsense/{task}/train.json"],
                validation=[f"$GATERA_DATA/commonsense/{task}/test.json"],
            )
            for task in MULTIPLE_CHOICE
        ]
        self.sources.append(
            DialogueDataModule(
                template="plain",
                train_on="response",
                split_by="persona",
                max_history_turns=2,
                train=[f"{CONVAI2}[:66]"],
                validation=[f"{CONVAI2}[66:]"],
                max_length=self.max_length,
            )
        )

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the backbone's tokenizer to this data module and to all its sources."""
        super().connect(tokenizer)
        for source in self.sources:
            source.connect(tokenizer)

    def examples(self, split: str) -> Iterator[Example]:
        """Yield the examples of a split, source by source; their numbers differ by at most one."""
        for number, source in enumerate(self.sources):
            share = range(number, self.counts[split], len(self.sources))
            yield from islice(source.examples(split), len(share))

    def token_lists(self) -> Iterator[dict[str, list[int]]]:
        """Yield the tokens of each training example as Hugging Face's collators expect them."""
        table = self.token_table("train")
        for index in range(len(table.examples)):
            batch = table.batch([index], self.train_on, all_candidates=False)
            yield {name: batch[name][0].tolist() for name in ("input_ids", "attention_mask", "labels")}
