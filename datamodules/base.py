"""SupervisedDataModule: connects a tokenizer, the splits of a task and the loaders for them."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import lightning as L
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.answers.options import ParsedAnswer, find_option
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.datamodules.batching.batch_schedule import micro_batches_per_epoch
from gatera_lightning.datamodules.batching.choice import choose_examples, indices_digest
from gatera_lightning.datamodules.batching.datasets import (
    LikelihoodBatches,
    PromptBatches,
    TokenTable,
    TrainingBatches,
)
from gatera_lightning.datamodules.batching.holdout import held_out_problems
from gatera_lightning.datamodules.batching.loader import ResumableLoader, evaluation_loader
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.overlap import SplitOverlap, find_split_overlaps
from gatera_lightning.datamodules.settings import (
    MOST_SEED,
    MOST_WORKERS,
    boolean_problems,
    integer_problems,
    subset_problems,
)
from gatera_lightning.datamodules.tokenization.cache import tokenize_split
from gatera_lightning.datamodules.tokenization.digest import examples_digest
from gatera_lightning.datamodules.tokenization.loss_mask import TrainOn
from gatera_lightning.errors import ConfigError, unknown_value

log = logging.getLogger(__name__)

EvaluateBy = Literal["likelihood", "generation"]

_SPLITS = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": ["test"]}


class SupervisedDataModule(L.LightningDataModule, ABC):
    """Prompts with known answers; subclasses implement :meth:`examples`.

    The data is tokenized for the backbone. Under a Trainer the tokenizer comes from the module's
    ``load_tokenizer()``; without one, call :meth:`connect` first.
    """

    free_text: ClassVar[bool] = False
    """True if answers are free text: generated answers are scored by text metrics, not as right or wrong."""

    answer_rule: ClassVar[str] = ""
    """The rule that judges generated answers, if predictions under another rule must not be reused."""

    ranking: ClassVar[str] = "accuracy"
    """Name of the top-1 ranking metric: accuracy or hits@1."""

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
        evaluate_by: list[EvaluateBy] | EvaluateBy = ["likelihood"],  # noqa: B006  # copied, never changed
        rank_validation: bool = False,
        weights: dict[str, float] | None = None,
    ) -> None:
        """Set what all tasks have in common.

        Args:
            train_on: response supervises the answer only, every_response also the earlier responses of a
                conversation, all also the whole prompt. Required, because it affects results more than the
                method does.
            max_length: Maximum number of tokens of prompt and answer; longer prompts lose their beginning.
            batch_size: Examples per optimizer step, over all micro-batches and ranks.
            eval_batch_size: Sequences per forward pass in evaluation, on each rank.
            token_budget: Close a step before it exceeds this many tokens; null for no limit.
            group_by_length: Form steps of examples of similar length, to save padding.
            packing: Pack the examples of a micro-batch into sequences of up to max_length tokens where that
                saves padding. Examples do not attend to each other, and losses stay the same.
            num_workers: Worker processes of each loader.
            seed: Seed of the batch schedule and of the order of its steps.
            held_out: Number or share of training examples to use as validation split, rounded up to whole
                groups where a task groups its examples. null uses a validation split of its own.
            evaluate_by: How test answers are found: likelihood, generation, or both.
            rank_validation: Score all candidates of the validation examples, which adds accuracies to
                monitor.
            weights: Share of each training source in an epoch, by the source's name in results. An epoch has
                as many examples as these sources together. null uses every example once.
        """
        super().__init__()
        self.save_hyperparameters(logger=False)  # including those of the subclass
        self.train_on: TrainOn = train_on  # type: ignore[assignment]  # setup rejects None
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.token_budget = token_budget
        self.group_by_length = group_by_length
        self.packing = packing
        self.num_workers = num_workers
        self.seed = seed
        self.held_out = held_out
        self.evaluate_by = list(evaluate_by) if isinstance(evaluate_by, list | tuple) else [evaluate_by]
        self.rank_validation = rank_validation
        self.weights = weights
        self.answered: dict[EvaluateBy, Collection[int]] = dict.fromkeys(get_args(EvaluateBy), ())
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_of: L.LightningModule | None = None  # whose tokenizer it is; None after connect()
        self.tables: dict[str, Dataset] = {}
        self._all_examples: dict[str, Dataset] = {}  # before the validation split is held out, or tasks mixed
        self._digests: dict[str, str] = {}
        self._choice: dict[str, str] = {}
        self._train_loader: ResumableLoader | None = None
        self._train_position: dict[str, Any] | None = None

    @abstractmethod
    def examples(self, split: str) -> Iterator[Example]:
        """Yield the examples of ``train``, ``validation`` or ``test``, in a fixed order.

        Raises:
            ConfigError: An example cannot be read; the message names file, line and field.
        """

    def parse_answer(self, text: str, labels: Sequence[str]) -> ParsedAnswer:
        """Parse a generated answer; by default, the candidate whose label is the first line of ``text``."""
        choice = find_option(text, labels)
        return ParsedAnswer(None if choice is None else labels[choice], choice)

    def problems(self, stage: str) -> list[str]:
        """Return every problem of the settings for ``stage`` (fit, validate, test or predict)."""
        problems = []
        if self.train_on not in get_args(TrainOn):
            problems.append(unknown_value("data.train_on", self.train_on, get_args(TrainOn)))
        for name in ("max_length", "batch_size", "eval_batch_size"):
            problems += integer_problems(name, getattr(self, name))
        problems += integer_problems("token_budget", self.token_budget, optional=True)
        problems += integer_problems("num_workers", self.num_workers, least=0, most=MOST_WORKERS)
        problems += integer_problems("seed", self.seed, least=0, most=MOST_SEED)
        for name in ("group_by_length", "packing", "rank_validation"):
            problems += boolean_problems(name, getattr(self, name))
        problems += held_out_problems(self.held_out)
        problems += subset_problems("evaluate_by", self.evaluate_by, get_args(EvaluateBy))
        return problems

    def _check(self, stage: str) -> None:
        if problems := self.problems(stage):
            raise ConfigError(problems)

    # --- tokenizer and splits ---

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the backbone's tokenizer, and drop what an earlier one tokenized."""
        self.tokenizer = tokenizer
        self._tokenizer_of = None
        self.tables.clear()
        self._all_examples.clear()
        self._digests.clear()
        self._choice.clear()

    def prepare_data(self) -> None:
        """Tokenize into the cache, once per node; errors in the data show here, before weights are loaded."""
        function = self.trainer.state.fn if self.trainer is not None else None
        stage = function.value if function is not None else "fit"
        self._check(stage)
        self._connect_to_module()
        for split in self.splits(stage):
            self._tokenize(split)

    def setup(self, stage: str) -> None:
        """Open the splits of a stage, hold out the validation split, and report overlaps before training."""
        self._train_position = None  # a position that was loaded for evaluation is not one of this run
        self._check(stage)
        self._connect_to_module()
        opened = [split for split in self.splits(stage) if split not in self.tables]
        for split in opened:
            self.tables[split] = self._all_examples[split] = self._tokenize(split)
            self._digests.pop(split, None)
        if "train" in opened:
            chosen = choose_examples(
                self.tables["train"], held_out=self.held_out, weights=self.weights, seed=self.seed
            )
            self._choice = {split: indices_digest(indices) for split, indices in chosen.items()}
            if self.held_out is not None or self.weights is not None:  # a selection is slower to read
                table = self._all_examples["train"]
                self.tables |= {split: table.select(indices) for split, indices in chosen.items()}
        if stage == "fit" and (self.trainer is None or self.trainer.is_global_zero):
            for overlap in self.overlaps():
                noteworthy = overlap.indices or overlap.reanswered or overlap.unread
                log.log(logging.WARNING if noteworthy else logging.INFO, "%s", overlap)

    def splits(self, stage: str) -> list[str]:
        """Return the splits a stage reads; a held-out validation split is taken from the training split."""
        held_out = self.held_out is not None and "validation" in _SPLITS[stage]
        return ["train"] if held_out else _SPLITS[stage]

    def overlaps(self) -> list[SplitOverlap]:
        """Compare the validation and the test split with the training split, which has to be open."""
        return find_split_overlaps(self.tables, lambda: self.examples("test"))

    def example_digests(self) -> dict[str, str]:
        """Return the SHA-256 of the open training and validation split: split -> hex digits.

        With ``held_out`` or ``weights``, it is that of all training examples, from which the settings choose.
        """
        for split in ("train", "validation"):
            if split in self._all_examples and split not in self._digests:
                self._digests[split] = examples_digest(self._all_examples[split])
        return dict(self._digests)

    def choice_digests(self) -> dict[str, str]:
        """Return the SHA-256 of which training examples ``held_out`` and ``weights`` choose, in order.

        Settings of the same effect have equal digests. The keys are ``train`` and, with ``held_out``,
        ``validation``; empty before the training split is open.
        """
        return dict(self._choice)

    def token_table(self, split: str) -> TokenTable:
        """Return the tokenized examples of an open split, ready to be collated."""
        assert self.tokenizer is not None  # setup has tokenized the split
        return TokenTable(
            self.tables[split], int(self.tokenizer.pad_token_id), int(self.tokenizer.eos_token_id)
        )

    def _tokenize(self, split: str) -> Dataset:
        assert self.tokenizer is not None  # connected by prepare_data and setup
        return tokenize_split(self.examples(split), self.tokenizer, self.max_length, split)

    def _connect_to_module(self) -> None:
        """Load the tokenizer of the Trainer's module, unless :meth:`connect` was called."""
        module = getattr(self.trainer, "lightning_module", None)
        if self.tokenizer is not None and self._tokenizer_of in (None, module):
            return
        load_tokenizer = getattr(module, "load_tokenizer", None)
        if load_tokenizer is None:
            raise RuntimeError(
                f"{type(self).__name__} has no tokenizer: call connect(tokenizer), or use a Trainer whose "
                "module has a method load_tokenizer(), such as GateRAModule"
            )
        self.connect(load_tokenizer())
        self._tokenizer_of = module

    # --- training batches ---

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of this rank's micro-batches, at the position that was restored, if any."""
        accumulate, limit = 1, 1.0
        if self.trainer is not None:
            accumulate, limit = self.trainer.accumulate_grad_batches, self.trainer.limit_train_batches
        ranks, rank = self._ranks()
        batches = TrainingBatches.schedule(
            self.token_table("train"),
            self.train_on,
            batch_size=self.batch_size,
            accumulate=accumulate,
            ranks=ranks,
            rank=rank,
            seed=self.seed,
            token_budget=self.token_budget,
            group_by_length=self.group_by_length,
            pack_length=self.max_length if self.packing else None,
        )
        self._train_loader = ResumableLoader(
            batches,
            seed=self.seed,
            num_workers=self.num_workers,
            micro_batches_per_epoch=micro_batches_per_epoch(len(batches), limit, accumulate),
        )
        if self._train_position is not None:
            self._train_loader.load_state_dict(self._train_position)
            self._train_position = None
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """Return the training loader's position, and digests of the examples and the choice it refers to."""
        if self._train_loader is None:
            return {}
        # Lightning saves the position as well, but does not restore what was saved in on_train_epoch_end.
        return {
            "train_position": self._train_loader.state_dict(),
            "examples": self.example_digests(),
            "choice": self.choice_digests(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader start at a saved position."""
        self._train_position = state_dict.get("train_position")

    # --- evaluation batches ---

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return a loader of the validation split: correct answers only, or all candidates to rank."""
        return self._likelihood_loader("validation", self.train_on, all_candidates=self.rank_validation)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader of the test split for each entry of ``evaluate_by``."""
        loaders: list[DataLoader[Any]] = []
        for kind in self.evaluate_by:
            if kind == "likelihood":  # candidates are compared by their own tokens only
                several = any(len(candidates) > 1 for candidates in self.tables["test"]["lengths"])
                loaders.append(self._likelihood_loader("test", "response", all_candidates=several))
            else:
                loaders.append(self._prompt_loader("test"))
        return loaders

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return the same loaders as for ``test``."""
        return self.test_dataloader()

    def skip_answered(self, answered: Mapping[EvaluateBy, Collection[int]]) -> None:
        """Leave out the test examples that were evaluated before: their indices for each ``EvaluateBy``."""
        self.answered = {kind: answered.get(kind, ()) for kind in self.answered}

    def _likelihood_loader(self, split: str, train_on: TrainOn, *, all_candidates: bool) -> DataLoader[Any]:
        ranks, rank = self._ranks()
        batches = LikelihoodBatches.shard(
            self.token_table(split),
            train_on,
            all_candidates=all_candidates,
            batch_size=self.eval_batch_size,
            ranks=ranks,
            rank=rank,
            done=self.answered["likelihood"] if split == "test" else (),
        )
        return evaluation_loader(batches, seed=self.seed, num_workers=self.num_workers)

    def _prompt_loader(self, split: str) -> DataLoader[Any]:
        ranks, rank = self._ranks()
        batches = PromptBatches.shard(
            self.token_table(split),
            batch_size=self.eval_batch_size,
            ranks=ranks,
            rank=rank,
            done=self.answered["generation"],
        )
        return evaluation_loader(batches, seed=self.seed, num_workers=self.num_workers)

    def _ranks(self) -> tuple[int, int]:
        """Number of ranks, and this rank."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
