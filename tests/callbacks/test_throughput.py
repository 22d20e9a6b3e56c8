"""Tokens a second against a clock that ticks a quarter second at every look."""

import csv
from itertools import count
from types import SimpleNamespace

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks import throughput
from gatera_lightning.callbacks.throughput import Throughput

TICK = 0.25


class Tape(L.Callback):
    """Real and target tokens of every micro-batch, counted from its tensors."""

    def __init__(self):
        self.tokens, self.targets = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.tokens.append(int(batch["attention_mask"].sum()))
        self.targets.append(int((batch["labels"] != -100).sum()))


@pytest.mark.parametrize(("accumulate", "every_n_steps"), [(1, 1), (1, 2), (2, 2), (2, 3)])
def test_totals_over_time(tiny_backbone, tmp_path, monkeypatch, accumulate, every_n_steps):
    ticks = count()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: TICK * next(ticks)))
    tape, logger = Tape(), CSVLogger(tmp_path)
    trainer = tiny_trainer(
        tmp_path,
        tape,
        Throughput(every_n_steps),
        logger=logger,
        accumulate_grad_batches=accumulate,
        limit_val_batches=1,
        val_check_interval=accumulate,  # the time for it is not counted
    )
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["throughput/tokens_per_second"]}
    assert min(rows) == every_n_steps
    for step in range(every_n_steps, 5, every_n_steps):
        part = slice((step - every_n_steps) * accumulate, step * accumulate)
        seconds = TICK * every_n_steps * accumulate
        assert float(rows[step]["throughput/tokens_per_second"]) == pytest.approx(sum(tape.tokens[part]) / seconds)
        assert float(rows[step]["throughput/target_tokens_per_second"]) == pytest.approx(sum(tape.targets[part]) / seconds)


def test_switched_off(tiny_backbone, tmp_path):
    trainer = tiny_trainer(tmp_path, Throughput(0), max_steps=2)
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    assert not [name for name in trainer.callback_metrics if name.startswith("throughput")]


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match=r"throughput\.every_n_steps: -1; accepted: at least 1, or 0 for never"):
        Throughput(-1)
