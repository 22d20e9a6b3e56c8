"""A callback for SLURM jobs under test: slows steps down, and writes one line per step."""

import json
import time
from pathlib import Path

import lightning as L


class Pace(L.Callback):
    """Every micro-batch takes ``seconds`` longer; ``steps_RANK.jsonl`` has [step, loss, example ids]."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        folder = Path(trainer.log_dir)
        loss = float(trainer.callback_metrics["train/loss"]).hex()
        with (folder / f"steps_{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step, loss, batch["example_ids"].tolist()]) + "\n")
        time.sleep(self.seconds)
