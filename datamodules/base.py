"""What every task family shares: cached token tables, planned training steps, evenly shared evaluation batches.

A family yields :class:`Example` objects; everything after that is here, once.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import datasets
import lightning as L
import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.batches import EvaluationBatches, TokenTable, TrainingBatches
from gatera_lightning.datamodules.loader import PlannedLoader
from gatera_lightning.datamodules.plan import plan_steps, share_evenly
from gatera_lightning.datamodules.tokens import Batch, Example, TrainOn, tokenise
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)

_CACHE_VERSION = 1
"""Raise it when tokenisation changes, so that no table of an older version is read."""


class SupervisedDataModule(L.LightningDataModule, ABC):
    """Prompts with known answers: what every task family shares.

    A family implements :meth:`examples`. Before the first loader, :meth:`connect` gives it the tokenizer.
    """

    def __init__(
        self,
        *,
        train_on: TrainOn,
        max_length: int = 256,
        batch_size: int = 32,
        eval_batch_size: int = 16,
        token_budget: int | None = None,
        group_by_length: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        held_out_rows: int | None = None,
    ) -> None:
        """What every family can be told.

        Args:
            train_on: response computes the loss on the answer only, all on the prompt as well.
            max_length: Tokens of prompt and answer together; a longer prompt loses its beginning, never its answer.
            batch_size: Rows in one optimizer step, over all micro-batches and processes.
            eval_batch_size: Sequences in one evaluation forward, per process.
            token_budget: Close a step before it holds more real tokens than this; null for no limit.
            group_by_length: Form steps from rows of similar length, so that less padding is computed.
            num_workers: Loader processes.
            seed: Seed of the plan (which rows form a step) and of the order of the steps.
            held_out_rows: Rows of the training split to validate on; null reads a validation split.
        """
        super().__init__()
        self.train_on = train_on
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.token_budget = token_budget
        self.group_by_length = group_by_length
        self.num_workers = num_workers
        self.seed = seed
        self.held_out_rows = held_out_rows
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.tables: dict[str, Dataset] = {}
        self.task_names: list[str] = []
        self._train_loader: PlannedLoader | None = None
        self._train_position: dict[str, Any] | None = None

    @abstractmethod
    def examples(self, split: str) -> Iterator[Example]:
        """Every example of ``train``, ``validation`` or ``test``. Raises ConfigError naming file, row and field."""

    def problems(self, stage: str) -> list[str]:
        """Everything about these settings that cannot work in ``stage`` (fit, validate, test, predict); empty if nothing."""
        found = []
        if self.train_on not in get_args(TrainOn):
            found.append(f"data.train_on: {self.train_on!r} is unknown; accepted: {', '.join(get_args(TrainOn))}")
        for name in ("max_length", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                found.append(f"data.{name}: {getattr(self, name)}; accepted: an integer of at least 1")
        if self.token_budget is not None and self.token_budget < 1:
            found.append(f"data.token_budget: {self.token_budget}; accepted: null, or an integer of at least 1")
        if self.held_out_rows is not None and self.held_out_rows < 1:
            found.append(f"data.validation: {self.held_out_rows} rows; accepted: sources, or at least 1 held-out row")
        return found

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the data the backbone's tokenizer; tables of an earlier one are closed."""
        self.tokenizer = tokenizer
        self.tables.clear()

    # --- tables: one row per example, tokenised once and cached on disk ---

    def prepare_data(self) -> None:
        """Tokenise into the cache, on one process per node; rows are checked here, before any weight is loaded."""
        function = self.trainer.state.fn if self.trainer is not None else None
        for split in self.splits(function.value if function is not None else "fit"):
            self._tokenised(split)

    def setup(self, stage: str) -> None:
        """Open the cached tables that a stage needs and hold out validation rows where asked."""
        self._train_position = None  # what an earlier evaluation loaded is not this run's
        for split in self.splits(stage):
            if split not in self.tables:
                self.tables[split] = self._tokenised(split)
        if self.held_out_rows is not None and "train" in self.tables and "validation" not in self.tables:
            table = self.tables["train"]
            if self.held_out_rows >= len(table):
                raise ConfigError(f"data.validation: {self.held_out_rows} rows held out of {len(table)} leave none to train on")
            order = np.random.default_rng(self.seed).permutation(len(table))
            self.tables["validation"] = table.select(np.sort(order[: self.held_out_rows]))
            self.tables["train"] = table.select(np.sort(order[self.held_out_rows :]))
        self.task_names = sorted({task for table in self.tables.values() for task in table.unique("task")})

    def splits(self, stage: str) -> list[str]:
        """The splits that a stage reads; held-out validation rows come from the training split."""
        by_stage = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": ["test"]}
        held_out = self.held_out_rows is not None and "validation" in by_stage[stage]
        return ["train"] if held_out else by_stage[stage]

    def _tokenised(self, split: str) -> Dataset:
        """Columns ``prompt`` (ids), ``answers`` (ids of each), ``lengths`` (prompt with each answer), ``gold``, ``task``,
        ``example`` (row number) and ``shortened``."""
        if self.tokenizer is None:
            raise RuntimeError("the data module has no tokenizer yet: call connect(tokenizer) first")
        tokenizer, max_length = self.tokenizer, self.max_length
        rows = [{**asdict(example), "example": number} for number, example in enumerate(self.examples(split))]
        if not rows:
            raise ConfigError(f"data.{split}: the split is empty; give at least one row")

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            try:
                prompt, answers, shortened = tokenise(tokenizer, row["prompt"], row["answers"], max_length)
            except ValueError as error:
                raise ConfigError(f"data.{split}, example {row['example']} ({row['prompt'][:60]!r}…): {error}") from error
            lengths = [len(prompt) + len(answer) for answer in answers]
            return {"prompt": prompt, "answers": answers, "lengths": lengths, "shortened": shortened}

        key = hashlib.sha256(json.dumps([_CACHE_VERSION, rows, max_length, _identity(tokenizer)]).encode()).hexdigest()[:32]
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "gatera_lightning"
        folder.mkdir(parents=True, exist_ok=True)
        table = Dataset.from_list(rows).map(
            encode,
            features=datasets.Features(
                {
                    "prompt": datasets.List(datasets.Value("int32")),
                    "answers": datasets.List(datasets.List(datasets.Value("int32"))),
                    "lengths": datasets.List(datasets.Value("int32")),
                    "gold": datasets.Value("int32"),
                    "task": datasets.Value("string"),
                    "example": datasets.Value("int32"),
                    "shortened": datasets.Value("bool"),
                }
            ),
            new_fingerprint=key,
            cache_file_name=str(folder / f"{key}.arrow"),
            desc=f"tokenising {split}",
        )
        shortened = sum(table["shortened"])
        if shortened:
            log.warning("%s: %d of %d prompts lost their beginning to max_length %d", split, shortened, len(table), max_length)
        return table

    # --- batches ---

    def _table(self, split: str) -> TokenTable:
        assert self.tokenizer is not None  # setup has tokenised
        return TokenTable(self.tables[split], self.task_names, int(self.tokenizer.pad_token_id))

    def train_dataloader(self) -> PlannedLoader:
        """Planned optimizer steps; the loader's state is its exact position."""
        trainer = self.trainer
        ranks, rank, accumulate = 1, 0, 1
        if trainer is not None:
            ranks, rank, accumulate = trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches
        table = self._table("train")
        lengths, targets = self._lengths(table.rows)
        if self.batch_size < accumulate * ranks:
            raise ConfigError(
                f"data.batch_size: {self.batch_size} rows a step cannot fill accumulate_grad_batches {accumulate} × "
                f"{ranks} processes; accepted: at least {accumulate * ranks}"
            )
        try:
            steps = plan_steps(
                lengths,
                targets,
                batch_size=self.batch_size,
                micro_batches=accumulate * ranks,
                seed=self.seed,
                token_budget=self.token_budget,
                group_by_length=self.group_by_length,
            )
        except ValueError as error:
            raise ConfigError(f"data.train: {error}") from error
        self._train_loader = PlannedLoader(
            TrainingBatches(table, steps, self.train_on, ranks=ranks, rank=rank), seed=self.seed, num_workers=self.num_workers
        )
        if self._train_position is not None:
            self._train_loader.load_state_dict(self._train_position)
            self._train_position = None
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """The training loader's position. Lightning saves it too, but does not restore what on_train_epoch_end saved."""
        return {} if self._train_loader is None else {"train_position": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader start from a saved position."""
        self._train_position = state_dict.get("train_position")

    def val_dataloader(self) -> DataLoader[Batch]:
        """The right answers of the validation split."""
        return self._evaluation_loader("validation", every_answer=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Every candidate answer of the test split."""
        return self._evaluation_loader("test", every_answer=True)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Every candidate answer of the test split."""
        return self.test_dataloader()

    def _evaluation_loader(self, split: str, *, every_answer: bool) -> DataLoader[Batch]:
        table = self._table(split)
        pairs, lengths = [], []
        for row, (gold, candidates) in enumerate(zip(table.rows["gold"], table.rows["lengths"], strict=True)):
            for answer, length in enumerate(candidates):
                if every_answer or answer == gold:
                    pairs.append((row, answer))
                    lengths.append(length)
        trainer = self.trainer
        ranks, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        batches = share_evenly(lengths, self.eval_batch_size, ranks, rank)
        return DataLoader(
            EvaluationBatches(
                table,
                [[pairs[i] for i in items] for items in batches],
                "response" if every_answer else self.train_on,  # candidates compete by their own tokens alone
            ),
            batch_size=None,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _lengths(self, table: Dataset) -> tuple[list[int], list[int]]:
        """Real and target tokens per row, as :func:`collate` will count them."""
        lengths, targets = [], []
        for prompt, candidates, gold in zip(table["prompt"], table["lengths"], table["gold"], strict=True):
            lengths.append(candidates[gold])
            unlabelled = max(1, len(prompt)) if self.train_on == "response" else 1
            targets.append(candidates[gold] - unlabelled)
        return lengths, targets


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does, as text: vocabulary, merges, pre-tokenizer and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((whole + repr(tokenizer.special_tokens_map)).encode()).hexdigest()
