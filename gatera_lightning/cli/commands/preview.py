"""`preview`: a recipe's data as the model sees it, from the tokenizer alone."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text
from typing_extensions import override

from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.dry_run import RecipeCLI
from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.batching.batch_schedule import build_batch_schedule
from gatera_lightning.datamodules.batching.datasets import PromptBatches, TokenTable
from gatera_lightning.datamodules.batching.statistics import (
    SplitStatistics,
    padding_share,
    scheduled_lengths,
)
from gatera_lightning.datamodules.loss_mask_view import decode_span, highlight_supervised
from gatera_lightning.datamodules.tokenization.loss_mask import TrainOn
from gatera_lightning.errors import ConfigError, unknown_value
from gatera_lightning.terminal.printing import SafeConsole

SPLITS = ("train", "validation", "test")


def preview(argv: Sequence[str]) -> None:
    """Print the first examples of a split as the model sees them, then statistics of the whole split.

    Args:
        argv: The flags of `preview`, and any flags of `fit`.

    Raises:
        ConfigError: The data cannot be read, or `fit` (for the test split: `test`) would reject it.
    """
    args, fit_flags = _parser().parse_before_fit(argv)
    problems = []
    if not args.rows.isdecimal() or int(args.rows) < 1:
        problems.append(f"--rows: {args.rows}; accepted: an integer of at least 1")
    if args.split not in SPLITS:
        problems.append(unknown_value("--split", args.split, SPLITS))
    if problems:
        raise ConfigError(problems)
    split = PreviewedSplit(["fit", *fit_flags], args.split)
    statistics = split.statistics()  # before anything is printed: this may raise what fit would raise
    console = SafeConsole(highlight=False, soft_wrap=True)
    for index in range(min(int(args.rows), len(split.table.examples))):
        console.print(split.example(index, color=console.is_terminal))
    for line in statistics:
        console.print(Text(line))


class PreviewedSplit(RecipeCLI):
    """A tokenized split of the recipe's data; settings that only training needs are not checked."""

    def __init__(self, args: list[str], split: str) -> None:
        """Parse a recipe and set up one split of its data.

        Args:
            args: A command line of `fit`.
            split: train, validation or test.

        Raises:
            ConfigError: The data cannot be read, or `fit` (for the test split: `test`) would reject it.
        """
        self.split = split
        self.stage = "test" if split == "test" else "fit"
        super().__init__(args)

    @override
    def after_instantiate_classes(self) -> None:
        """Check backbone and data, and tokenize the split."""
        problems = [f"model.{problem}" for problem in self.model.backbone.problems()]
        problems += self.datamodule.problems(self.stage)
        if problems:
            raise ConfigError(problems)
        self.datamodule.connect(load_tokenizer(self.model.backbone))
        # The ranks share the batches of an evaluation; a single rank has all of them.
        self.set_up_data(self.stage, self.world_size if self.split == "train" else 1)

    @property
    def train_on(self) -> TrainOn:
        """Which tokens are supervised; a test compares candidates by their own tokens alone."""
        return "response" if self.split == "test" else self.datamodule.train_on

    @property
    def table(self) -> TokenTable:
        """The examples of the split."""
        return self.datamodule.token_table(self.split)

    def example(self, index: int, *, color: bool) -> Text:
        """Return one example: heading, prompt, correct answer, and candidates if the split ranks them.

        Args:
            index: Number of the example in the split.
            color: Mark supervised tokens by color instead of brackets.
        """
        data, tokenizer = self.datamodule, self.datamodule.tokenizer
        assert tokenizer is not None  # connected above
        example = self.table.examples[index]
        batch = self.table.batch([index], self.train_on, all_candidates=False)
        supervised = int((batch["labels"] != IGNORE_INDEX).sum())
        tokens = int(batch["attention_mask"].sum())
        truncated = f", prompt truncated to max_length {data.max_length}" if example["truncated"] else ""
        text = Text(
            f"example {example['example']}, {example['task']}: {tokens:,} tokens, "
            f"{supervised:,} supervised{truncated}\n"
        )
        text.append_text(highlight_supervised(tokenizer, batch, 0, color=color))
        if self.split == "test" or (self.split == "validation" and data.rank_validation):
            for number, ids in enumerate(example["answers"]):
                correct = number == example["gold"]
                text.append(f"\n  {'correct' if correct else 'wrong'}, {len(ids)} tokens: ")
                text.append_text(decode_span(tokenizer, ids, highlighted=correct, color=color))
        return text

    def statistics(self) -> list[str]:
        """Return statistics of the whole split, one per line."""
        data = self.datamodule
        split = SplitStatistics.from_table(data.tables[self.split], self.train_on)
        examples, quantile = len(split.lengths), split.length_quantile
        lines = [
            f"{self.split}: {examples:,} examples",
            "  tasks       " + ", ".join(f"{task} {count:,}" for task, count in split.tasks.items()),
            f"  lengths     {quantile(0):,} to {quantile(1):,} tokens, median {quantile(0.5):,}, "
            f"95 % at most {quantile(0.95):,}",
            f"  supervised  {split.supervised_tokens:,} of {split.tokens:,} non-padding tokens "
            f"({_percent(split.supervised_tokens / split.tokens)})",
            f"  truncated   {split.truncated:,} prompts ({_percent(split.truncated / examples)}) "
            f"to max_length {data.max_length}",
        ]
        lines += self._batch_schedule(split.lengths) if self.split == "train" else self._evaluation_batches()
        return lines + ([str(overlap) for overlap in data.overlaps()] if "train" in data.tables else [])

    def _batch_schedule(self, lengths: list[int]) -> list[str]:
        """Padding of the batch schedule, and of other schedules: with and without grouping and packing."""
        data = self.datamodule
        steps = data.train_dataloader().dataset.steps
        other_steps = build_batch_schedule(
            lengths,
            lengths,  # stands for the supervised tokens, which do not affect padding
            batch_size=data.batch_size,
            micro_batches=self.accumulate * self.world_size,
            seed=data.seed,
            token_budget=data.token_budget,
            group_by_length=not data.group_by_length,
        )
        pack_length, other_pack_length = (data.max_length, None) if data.packing else (None, data.max_length)
        padding = padding_share(scheduled_lengths(steps, lengths, pack_length))
        other_grouping = padding_share(scheduled_lengths(other_steps, lengths, pack_length))
        other_packing = padding_share(scheduled_lengths(steps, lengths, other_pack_length))
        budget = "" if data.token_budget is None else f" (and token_budget {data.token_budget})"
        micro_batches = f"accumulate_grad_batches {self.accumulate} × {self.world_size} ranks"
        return [
            f"  padding     {_percent(padding)} of the computed positions; "
            f"{_percent(other_grouping)} with group_by_length: {str(not data.group_by_length).lower()}, "
            f"{_percent(other_packing)} with packing: {str(not data.packing).lower()}",
            f"  steps       {len(steps):,} optimizer steps per epoch, "
            f"of batch_size {data.batch_size}{budget} over {micro_batches}{self.world_size_remark}",
        ]

    def _evaluation_batches(self) -> list[str]:
        """Padding of the evaluation batches, one line for each way of evaluating."""
        data = self.datamodule
        loaders = data.test_dataloader() if self.split == "test" else [data.val_dataloader()]
        lines = []
        for loader in loaders:
            batches: Any = loader.dataset
            generates = isinstance(batches, PromptBatches)
            positions = "prompt positions, for generation" if generates else "computed positions"
            padding = _percent(padding_share(batches.row_lengths()))
            lines.append(
                f"  padding     {padding} of the {positions}, in {len(batches):,} batches of eval_batch_size "
                f"{data.eval_batch_size}"
            )
        return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _parser() -> SubcommandParser:
    parser = SubcommandParser(
        "preview",
        usage="%(prog)s [--rows N] [--split SPLIT] [--config CONFIG ...] [any flag of fit]",
        description="Show examples of a split as the model sees them, and statistics of the whole split. "
        "Loads no weights.",
        epilog=f"All other flags are those of fit: see {PROGRAM} fit --help",
    )
    parser.add_argument("--rows", metavar="N", default="3", help="number of examples to show; default: 3")
    parser.add_argument("--split", default="train", help=f"{', '.join(SPLITS)}; default: train")
    return parser
