"""Rows of ARC-Easy, ARC-Challenge, OpenBookQA and ConvAI2 in one data module, prompted as the smollm2 recipes prompt them."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules import (
    CommonsenseDataModule,
    DialogueDataModule,
    Example,
    SupervisedDataModule,
)

MULTIPLE_CHOICE = ("ARC-Easy", "ARC-Challenge", "openbookqa")
DIALOGUE = "$GATERA_DATA/dialogue/convai2/valid_self_original.shared.txt"


class MixedRows(SupervisedDataModule):
    """The first rows of each source, a quarter each: training files to learn from, test files and other personas held out."""

    free_text = True

    def __init__(self, *, rows: int, held_out_rows: int, **common: Any) -> None:
        super().__init__(train_on="response", **common)
        self.counts = {"train": rows, "validation": held_out_rows, "test": 0}
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
                train=[f"{DIALOGUE}[:66]"],
                validation=[f"{DIALOGUE}[66:]"],
                max_length=self.max_length,
            )
        )

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the data, and every source of it, the backbone's tokenizer."""
        super().connect(tokenizer)
        for source in self.sources:
            source.connect(tokenizer)

    def examples(self, split: str) -> Iterator[Example]:
        """As many of every source, to within one."""
        for number, source in enumerate(self.sources):
            share = range(number, self.counts[split], len(self.sources))
            yield from islice(source.examples(split), len(share))

    def token_rows(self) -> Iterator[dict[str, list[int]]]:
        """The training rows as Hugging Face's collators want them: what our batch of each row alone holds, as plain lists."""
        table = self.token_table("train")
        for row in range(len(table.examples)):
            batch = table.batch([row], self.train_on, all_candidates=False)
            yield {name: batch[name][0].tolist() for name in ("input_ids", "attention_mask", "labels")}
