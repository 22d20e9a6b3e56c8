"""What every task family shares: cached token tables, planned training steps, evenly shared evaluation batches.

A family yields :class:`Example` objects; everything after that is here, once.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.answers.options import Reading, matching_option
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.datamodules.batching.datasets import (
    LikelihoodBatches,
    PromptBatches,
    TokenTable,
    TrainingBatches,
)
from gatera_lightning.datamodules.batching.holdout import held_out_rows
from gatera_lightning.datamodules.batching.loader import PlannedLoader, ignore_signals
from gatera_lightning.datamodules.batching.mixture import mixed_rows
from gatera_lightning.datamodules.batching.statistics import right_lengths, target_counts
from gatera_lightning.datamodules.batching.step_plan import plan_steps, share_batches
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.leakage import Leakage, find_leakage
from gatera_lightning.datamodules.tokenization.cache import tokenize_split
from gatera_lightning.datamodules.tokenization.loss_mask import TrainOn
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)

EvaluateBy = Literal["likelihood", "generation"]


class SupervisedDataModule(L.LightningDataModule, ABC):
    """Prompts with known answers: what every task family shares.

    A family implements :meth:`examples`. Before the first loader, :meth:`connect` gives it the tokenizer.
    """

    free_text: ClassVar[bool] = False
    """Generated texts are compared with the right answer's by metrics of text; nothing in them is right or wrong."""

    ranking: ClassVar[str] = "accuracy"
    """What the share of questions is called whose right answer is ranked first."""

    def __init__(
        self,
        *,
        train_on: TrainOn | None = None,
        max_length: int = 256,
        batch_size: int = 32,
        eval_batch_size: int = 16,
        token_budget: int | None = None,
        group_by_length: bool = True,
        packing: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        held_out: int | float | None = None,
        evaluate_by: list[EvaluateBy] = ["likelihood"],  # noqa: B006  # copied, never changed
        rank_validation: bool = False,
        weights: dict[str, float] | None = None,
    ) -> None:
        """What every family can be told.

        Args:
            train_on: response computes the loss on the answer only, every_response on the earlier responses of a conversation
                as well, all on the whole prompt as well. Has to be said: it decides more of a result than the method does.
            max_length: Tokens of prompt and answer together; a longer prompt loses its beginning, never its answer.
            batch_size: Rows in one optimizer step, over all micro-batches and processes.
            eval_batch_size: Sequences in one evaluation forward, per process.
            token_budget: Close a step before it holds more real tokens than this; null for no limit.
            group_by_length: Form steps from rows of similar length, so that less padding is computed.
            packing: Lay the rows of a micro-batch behind each other in lines of at most max_length tokens, where that computes
                less padding. Rows never attend to each other, and losses stay the same.
            num_workers: Loader processes.
            seed: Seed of the plan (which rows form a step) and of the order of the steps.
            held_out: Rows of the training split to validate on, or their share; more where a family's rows stay together
                in groups. null reads a validation split.
            evaluate_by: How test answers are found: likelihood, generation, or both.
            rank_validation: Score every candidate of a validation row, which gives accuracies to stop or choose by.
            weights: How often the rows of each training source come, by the name that results call it by: its share of an
                epoch, which stays as long as the sources are together. null takes every row once.
        """
        super().__init__()
        self.save_hyperparameters(logger=False)  # the subclass's settings, for whoever reports on a run
        self.train_on: TrainOn = train_on  # type: ignore[assignment]  # setup refuses None
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.token_budget = token_budget
        self.group_by_length = group_by_length
        self.packing = packing
        self.num_workers = num_workers
        self.seed = seed
        self.held_out = held_out
        self.evaluate_by = list(evaluate_by)
        self.rank_validation = rank_validation
        self.weights = weights
        self.answered: dict[EvaluateBy, Collection[int]] = {
            "likelihood": frozenset(),
            "generation": frozenset(),
        }
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.tables: dict[str, Dataset] = {}
        self._train_loader: PlannedLoader | None = None
        self._train_position: dict[str, Any] | None = None

    @abstractmethod
    def examples(self, split: str) -> Iterator[Example]:
        """Every example of ``train``, ``validation`` or ``test``. Raises ConfigError naming file, row and field."""

    def problems(self, stage: str) -> list[str]:
        """Everything about these settings that cannot work in ``stage`` (fit, validate, test, predict); empty if nothing."""
        found = []
        if self.train_on not in get_args(TrainOn):
            found.append(unknown("train_on", self.train_on, get_args(TrainOn)))
        for name in ("max_length", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                found.append(f"data.{name}: {getattr(self, name)}; accepted: an integer of at least 1")
        if self.token_budget is not None and self.token_budget < 1:
            found.append(
                f"data.token_budget: {self.token_budget}; accepted: null, or an integer of at least 1"
            )
        rows = self.held_out
        if isinstance(rows, bool) or (
            rows is not None and not (rows >= 1 if isinstance(rows, int) else 0 < rows < 1)
        ):
            found.append(
                f"data.validation: {rows} held out; accepted: sources, an integer of at least 1, or a share between 0 and 1"
            )
        ways = get_args(EvaluateBy)
        if not self.evaluate_by or sorted(set(self.evaluate_by) & set(ways)) != sorted(self.evaluate_by):
            found.append(
                f"data.evaluate_by: {self.evaluate_by}; accepted: a list of {' and '.join(ways)}, each at most once"
            )
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
        if self.train_on not in get_args(TrainOn):
            raise ConfigError(unknown("train_on", self.train_on, get_args(TrainOn)))
        opened = [split for split in self.splits(stage) if split not in self.tables]
        for split in opened:
            self.tables[split] = self._tokenised(split)
        if "train" in opened and self.held_out is not None:
            table = self.tables["train"]
            held_out = held_out_rows(table["group"], self._held_out(len(table)), self.seed)
            if held_out.all():
                raise ConfigError(
                    f"data.validation: {self.held_out} held out of {len(table)} rows, in groups that stay together, "
                    "leave none to train on"
                )
            self.tables["validation"] = table.select(np.flatnonzero(held_out))
            self.tables["train"] = table.select(np.flatnonzero(~held_out))
        if "train" in opened and self.weights is not None:
            table = self.tables["train"]
            try:
                self.tables["train"] = table.select(mixed_rows(table["task"], self.weights, self.seed))
            except ValueError as error:
                raise ConfigError(f"data.weights: {error}") from error
        if stage == "fit" and (self.trainer is None or self.trainer.is_global_zero):
            for found in self.leakage():
                log.log(logging.WARNING if found.rows or found.unread else logging.INFO, "%s", found)

    def splits(self, stage: str) -> list[str]:
        """The splits that a stage reads; held-out validation rows come from the training split."""
        by_stage = {
            "fit": ["train", "validation"],
            "validate": ["validation"],
            "test": ["test"],
            "predict": ["test"],
        }
        held_out = self.held_out is not None and "validation" in by_stage[stage]
        return ["train"] if held_out else by_stage[stage]

    def _tokenised(self, split: str) -> Dataset:
        if self.tokenizer is None:
            raise RuntimeError("the data module has no tokenizer yet: call connect(tokenizer) first")
        return tokenize_split(self.examples(split), self.tokenizer, self.max_length, split)

    def _held_out(self, rows: int) -> int:
        """How many of ``rows`` training rows are held out for validation. Raises ConfigError when none would be left."""
        assert self.held_out is not None
        count = self.held_out if isinstance(self.held_out, int) else max(1, round(self.held_out * rows))
        if count >= rows:
            raise ConfigError(
                f"data.validation: {self.held_out} held out of {rows} rows leave none to train on"
            )
        return count

    def leakage(self) -> list[Leakage]:
        """Which validation and test questions are training rows too, and which test questions are validation rows."""
        trained = set(self.tables["train"]["key"])
        found: list[Leakage] = []
        chosen_by: set[str] = set()
        if "validation" in self.tables:
            table = self.tables["validation"]
            found.append(find_leakage(trained, table["key"], table["task"], "validation"))
            chosen_by = set(table["key"])
        try:
            tested = [(example.key, example.task) for example in self.examples("test")]
        except ConfigError as error:  # training needs no test rows
            return [*found, Leakage("test", 0, unread=str(error))]
        if tested:
            keys, tasks = zip(*tested, strict=True)
            found.append(find_leakage(trained, keys, tasks, "test"))
            chosen = find_leakage(chosen_by, keys, tasks, "test", known="validation")
            found += [chosen] if chosen.rows else []
        return found

    # --- batches ---

    def _table(self, split: str) -> TokenTable:
        assert self.tokenizer is not None  # setup has tokenised
        return TokenTable(
            self.tables[split], int(self.tokenizer.pad_token_id), int(self.tokenizer.eos_token_id)
        )

    def train_dataloader(self) -> PlannedLoader:
        """Planned optimizer steps; the loader's state is its exact position."""
        trainer = self.trainer
        ranks, rank, accumulate, limit = 1, 0, 1, 1.0
        if trainer is not None:
            ranks, rank, accumulate = trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches
            limit = trainer.limit_train_batches
        table = self._table("train")
        lengths, targets = right_lengths(table.rows), target_counts(table.rows, self.train_on)
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
        line = self.max_length if self.packing else None
        batches = TrainingBatches(table, steps, self.train_on, ranks=ranks, rank=rank, line=line)
        epoch = min(
            len(batches), limit if isinstance(limit, int) else int(limit * len(batches))
        )  # as Lightning counts
        if epoch % accumulate:
            raise ConfigError(
                f"trainer.limit_train_batches: {limit} (fast_dev_run and overfit_batches set it too) ends an epoch behind "
                f"{epoch} micro-batches, in the middle of a step; accepted: a multiple of accumulate_grad_batches, {accumulate}"
            )
        self._train_loader = PlannedLoader(
            batches, seed=self.seed, num_workers=self.num_workers, epoch_ends_at=epoch
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
        """The right answers of the validation split, or all its candidates (``rank_validation``)."""
        return self._likelihood_loader("validation", self.train_on, every_answer=self.rank_validation)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The test split, once for each way of evaluating: questions with all candidates, prompts to complete."""
        loaders: list[DataLoader[Any]] = []
        for kind in self.evaluate_by:
            if kind == "likelihood":  # candidates compete by their own tokens alone
                several = any(len(answers) > 1 for answers in self.tables["test"]["lengths"])
                loaders.append(self._likelihood_loader("test", "response", every_answer=several))
            else:
                prompts = [len(ids) for ids in self.tables["test"]["prompt"]]
                batches = self._shared(prompts, self.eval_batch_size, self.answered["generation"])
                loaders.append(self._loader(PromptBatches(self._table("test"), batches)))
        return loaders

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """As for ``test``."""
        return self.test_dataloader()

    def read_answer(self, text: str, labels: Sequence[str]) -> Reading:
        """What a generated text answers; here: the candidate whose text its first line is."""
        choice = matching_option(text, labels)
        return Reading(None if choice is None else labels[choice], choice)

    def _likelihood_loader(self, split: str, train_on: TrainOn, *, every_answer: bool) -> DataLoader[Any]:
        table = self._table(split)
        lengths = (
            [max(lengths) for lengths in table.rows["lengths"]] if every_answer else right_lengths(table.rows)
        )
        most = max(len(answers) for answers in table.rows["lengths"]) if every_answer else 1
        done = self.answered["likelihood"] if split == "test" else frozenset()
        batches = self._shared(lengths, max(1, self.eval_batch_size // most), done)
        return self._loader(LikelihoodBatches(table, batches, train_on, every_answer))

    def _shared(self, lengths: list[int], batch_size: int, done: Collection[int]) -> list[list[int]]:
        trainer = self.trainer
        ranks, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        return share_batches(lengths, batch_size, ranks, rank, done)

    def _loader(self, batches: LikelihoodBatches | PromptBatches) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(
            self.seed
        )  # else workers draw from, and move, the global one
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=self.num_workers,
            generator=generator,
            worker_init_fn=ignore_signals,
        )


def unknown(name: str, value: object, accepted: Sequence[str]) -> str:
    """The problem of a setting with a closed choice."""
    what = "is not set" if value is None else f"{value!r} is unknown"
    return f"data.{name}: {what}; accepted: {', '.join(accepted)}"
