"""A summary of the run, printed before training starts."""

from collections import Counter
from typing import Any

import lightning as L
from rich.text import Text
from typing_extensions import override

from gatera_lightning.datamodules.loss_mask_view import highlight_supervised
from gatera_lightning.terminal.printing import SafeConsole


class RunSummary(L.Callback):
    """Print the adapted layers, parameter counts by dtype, one training example and the log folder.

    The example shows the loss mask: supervised tokens are green, or between ``⟦`` and ``⟧`` if the output is
    not a terminal.

    Example:
        >>> trainer = Trainer(callbacks=[RunSummary()])
    """

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = (
            trainer.log_dir or trainer.default_root_dir
        )  # log_dir is a collective: all ranks have to read it
        if not trainer.is_global_zero:
            return
        console = SafeConsole(highlight=False, soft_wrap=True)
        module: Any = pl_module
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
