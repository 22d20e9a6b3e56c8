"""A summary of the run, printed before training starts."""

from collections import Counter
from typing import Any

import lightning as L
from rich.text import Text
from typing_extensions import override

from gatera_lightning.datamodules.loss_mask_view import highlight_supervised
from gatera_lightning.gate_analysis.skipped_tokens import SkippedTokens, describe_shares, gates_decide
from gatera_lightning.gate_analysis.statistics import counted_tokens
from gatera_lightning.terminal.printing import SafeConsole


class RunSummary(L.Callback):
    """Print the adapted layers, parameter counts by dtype, one training example and the log folder.

    At the end, it prints the share of tokens that each layer skips, if the gates decide.

    The example shows the loss mask: supervised tokens are green, or between ``⟦`` and ``⟧`` if the output is
    not a terminal.

    Example:
        >>> trainer = Trainer(callbacks=[RunSummary()])
    """

    def __init__(self) -> None:
        self._skipped = SkippedTokens()
        self._step, self._decides = -1, False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = (
            trainer.log_dir or trainer.default_root_dir
        )  # log_dir is a collective: all ranks have to read it
        module: Any = pl_module
        self._decides = gates_decide(module.model)
        if not trainer.is_global_zero:
            return
        console = SafeConsole(highlight=False, soft_wrap=True)
        console.print(Text(str(module.report)))
        counts: Counter[tuple[str, str]] = Counter()
        for parameter in module.model.parameters():
            kind = "trainable" if parameter.requires_grad else "frozen"
            counts[kind, str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        for (kind, dtype), count in sorted(counts.items(), reverse=True):
            console.print(f"  {kind:<9} {dtype:<9} {count:>15,}")
        data: Any = getattr(trainer, "datamodule", None)
        if data is not None and trainer.train_dataloader is not None:
            batch = trainer.train_dataloader.dataset[0]
            console.print("a training example, with its supervised tokens marked:")
            console.print(highlight_supervised(data.tokenizer, batch, row=0, color=console.is_terminal))
        console.print(Text(f"logs and checkpoints: {folder}"))

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._skipped.clear()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._decides:
            self._skipped.add(outputs["gates"], counted_tokens(batch))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        shares = self._skipped.shares()
        if shares and trainer.is_global_zero:
            text = f"skipped by gates in the last optimizer step: {describe_shares(shares)}"
            SafeConsole(highlight=False, soft_wrap=True).print(Text(text))
