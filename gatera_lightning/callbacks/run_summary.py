"""What is about to be trained, said once before it starts."""

from collections import Counter
from typing import Any

import lightning as L
from rich.console import Console
from rich.text import Text
from typing_extensions import override

from gatera_lightning.datamodules.loss_mask_view import masked_text


class RunSummary(L.Callback):
    """Prints one decoded training example with its loss mask, parameter counts by dtype, and where the logs go.

    Tokens that carry loss are green; where there is no colour they stand between ``⟦`` and ``⟧``.
    """

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir is a broadcast: every rank asks
        if not trainer.is_global_zero:
            return
        console = Console(highlight=False, soft_wrap=True)
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
            console.print("a training example, tokens with loss marked:")
            console.print(masked_text(data.tokenizer, batch, row=0, colour=console.is_terminal))
        console.print(Text(f"logs and checkpoints: {folder}"))
