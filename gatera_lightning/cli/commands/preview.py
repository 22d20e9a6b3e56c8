"""``preview``: what a recipe's data looks like to the model, from the tokenizer alone — no weights, no accelerator."""

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.dry_run import PlannedTrainer, RecipeCLI, planned_world_size
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.batching.datasets import PromptBatches, TokenTable
from gatera_lightning.datamodules.batching.statistics import (
    SplitStatistics,
    evaluation_lengths,
    padding_share,
    planned_lengths,
)
from gatera_lightning.datamodules.batching.step_plan import plan_steps
from gatera_lightning.datamodules.loss_mask_view import marked_text, masked_text
from gatera_lightning.datamodules.tokenization.loss_mask import TrainOn
from gatera_lightning.errors import ConfigError

_SPLITS = ("train", "validation", "test")


def preview(argv: Sequence[str]) -> None:
    """Print ``--rows`` rows of ``--split`` as the model will see them, then the figures of the whole split.

    Everything else in ``argv`` is as for ``fit``. Raises ConfigError for data that ``fit`` (or ``test``) would refuse.
    """
    own, others = _parser().parse_known_args(argv)
    problems = []
    if not own.rows.isdecimal() or int(own.rows) < 1:
        problems.append(f"--rows: {own.rows}; accepted: an integer of at least 1")
    if own.split not in _SPLITS:
        problems.append(f"--split: {own.split!r} is unknown; accepted: {', '.join(_SPLITS)}")
    if problems:
        raise ConfigError(problems)
    run = PreviewedSplit(["fit", *others], own.split)
    figures = run.figures()  # before anything is printed: what fit would refuse is refused here
    console = Console(highlight=False, soft_wrap=True)
    for row in range(min(int(own.rows), len(run.table.rows))):
        console.print(run.row(row, colour=console.is_terminal))
    for line in figures:
        console.print(Text(line))


class PreviewedSplit(RecipeCLI):
    """A split of ``fit``'s data and the backbone's tokenizer; what training alone needs is neither built nor checked."""

    def __init__(self, args: list[str], split: str) -> None:
        self.split = split
        self.stage = "test" if split == "test" else "fit"
        super().__init__(args)

    def after_instantiate_classes(self) -> None:
        """Check tokenizer and data, and bring them together."""
        problems = [
            f"model.{problem}" for problem in self.model.backbone.problems()
        ] + self.datamodule.problems(self.stage)
        if problems:
            raise ConfigError(problems)
        self.datamodule.connect(load_tokenizer(self.model.backbone))

    def _run_subcommand(self, subcommand: str) -> None:
        """Open the split, where ``fit`` would train."""
        trainer = self.config.fit.trainer
        self.accumulate: int = trainer.accumulate_grad_batches
        self.processes, self.remark = planned_world_size(trainer.devices, trainer.num_nodes)
        # Evaluation batches do not depend on the number of processes, which only share them out: one has them all.
        processes = self.processes if self.split == "train" else 1
        self.datamodule.trainer = PlannedTrainer(processes, self.accumulate)  # type: ignore[assignment]
        self.datamodule.setup(self.stage)

    @property
    def train_on(self) -> TrainOn:
        """Which tokens of the split carry loss: candidates of a test compete by their own alone."""
        return "response" if self.split == "test" else self.datamodule.train_on

    @property
    def table(self) -> TokenTable:
        """The rows of the split."""
        data = self.datamodule
        assert data.tokenizer is not None  # connected above
        return TokenTable(
            data.tables[self.split], int(data.tokenizer.pad_token_id), int(data.tokenizer.eos_token_id)
        )

    def row(self, row: int, *, colour: bool) -> Text:
        """One row under a line about it: prompt and right answer, then the candidates where they are compared."""
        data = self.datamodule
        assert data.tokenizer is not None
        entry, batch = self.table.rows[row], self.table.batch([row], self.train_on, every_answer=False)
        targets = int((batch["labels"] != IGNORE_INDEX).sum())
        tokens = int(batch["attention_mask"].sum())
        shortened = f", prompt shortened to max_length {data.max_length}" if entry["truncated"] else ""
        text = Text(
            f"example {entry['example']}, {entry['task']}: {tokens:,} tokens, {targets:,} targets{shortened}\n"
        )
        text.append_text(masked_text(data.tokenizer, batch, 0, colour=colour))
        if self.split == "test" or (self.split == "validation" and data.rank_validation):
            for number, ids in enumerate(entry["answers"]):
                right = number == entry["gold"]
                text.append(f"\n  {'right' if right else 'wrong'}, {len(ids)} tokens: ")
                text.append_text(marked_text(data.tokenizer, ids, marked=right, colour=colour))
        return text

    def figures(self) -> list[str]:
        """The figures of the whole split, one line each."""
        data = self.datamodule
        split = SplitStatistics.of(data.tables[self.split], self.train_on)
        rows = len(split.lengths)
        lines = [
            f"{self.split}: {rows:,} rows",
            "  tasks       " + ", ".join(f"{task} {count:,}" for task, count in split.tasks.items()),
            f"  lengths     {split.length(0):,} to {split.length(1):,} tokens, median {split.length(0.5):,}, "
            f"95 % at most {split.length(0.95):,}",
            f"  targets     {split.targets:,} of {split.tokens:,} real tokens ({_percent(split.targets / split.tokens)})",
            f"  shortened   {split.shortened:,} prompts ({_percent(split.shortened / rows)}) to max_length {data.max_length}",
        ]
        lines += self._plan(split.lengths) if self.split == "train" else self._evaluation()
        return lines + ([str(found) for found in data.leakage()] if "train" in data.tables else [])

    def _plan(self, lengths: list[int]) -> list[str]:
        data = self.datamodule
        steps = data.train_dataloader().dataset.steps
        others = plan_steps(
            lengths,
            lengths,  # targets do not matter to padding
            batch_size=data.batch_size,
            micro_batches=self.accumulate * self.processes,
            seed=data.seed,
            token_budget=data.token_budget,
            group_by_length=not data.group_by_length,
        )
        line, other_line = (data.max_length, None) if data.packing else (None, data.max_length)
        padding = padding_share(planned_lengths(steps, lengths, line))
        ungrouped = padding_share(planned_lengths(others, lengths, line))
        other = padding_share(planned_lengths(steps, lengths, other_line))
        budget = "" if data.token_budget is None else f" (and token_budget {data.token_budget})"
        return [
            f"  padding     {_percent(padding)} of the computed positions; {_percent(ungrouped)} with group_by_length: "
            f"{str(not data.group_by_length).lower()}, {_percent(other)} with packing: {str(not data.packing).lower()}",
            f"  steps       {len(steps):,} optimizer steps an epoch, of batch_size {data.batch_size}{budget} over "
            f"accumulate_grad_batches {self.accumulate} × {self.processes} processes{self.remark}",
        ]

    def _evaluation(self) -> list[str]:
        data = self.datamodule
        loaders = data.test_dataloader() if self.split == "test" else [data.val_dataloader()]
        lines = []
        for loader in loaders:
            batches: Any = loader.dataset
            what = (
                "prompts' positions, to generate from"
                if isinstance(batches, PromptBatches)
                else "computed positions"
            )
            padding = _percent(padding_share(evaluation_lengths(batches)))
            cut = f"in {len(batches):,} batches of eval_batch_size {data.eval_batch_size}"
            lines.append(f"  padding     {padding} of the {what}, {cut}")
        return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} preview",
        usage="%(prog)s [--rows N] [--split SPLIT] [--config CONFIG ...] [any flag of fit]",
        description="Show rows of a split as the model will see them, and the figures of all of it. Loads no weights.",
        epilog=f"Every other flag is as for fit: see {PROGRAM} fit --help",
        allow_abbrev=False,
    )
    parser.add_argument("--rows", metavar="N", default="3", help="how many rows to show; default: 3")
    parser.add_argument("--split", default="train", help=f"{', '.join(_SPLITS)}; default: train")
    return parser
