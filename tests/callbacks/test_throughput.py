"""Tests of Throughput: rates against a simulated clock, and FLOPs against those of real steps."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_backbone import tiny_data, tiny_module, tiny_trainer
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning.callbacks import throughput
from gatera_lightning.callbacks.throughput import Throughput
from gatera_lightning.cost_model import step_costs as costs
from gatera_lightning.cost_model.step_costs import MicroBatch

WAIT, WORK = 0.75, 2.0


class Clock(L.Callback):
    """Advances a simulated clock for the data and the work of each micro-batch, and for validations."""

    def __init__(self, monkeypatch):
        self.now, self.tokens, self.targets = 0.0, [], []
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.now += WAIT

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.now += WORK
        self.tokens.append(int(batch["attention_mask"].sum()))
        self.targets.append(int((batch["labels"] != -100).sum()))

    def on_validation_end(self, trainer, module):
        self.now += 1000.0


def logged_values(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/tokens_per_second"]]
    return {
        int(row["step"]): {
            name.removeprefix("throughput/"): float(value)
            for name, value in row.items()
            if name.startswith("throughput/") and value
        }
        for row in rows
    }


@pytest.mark.parametrize(("accumulate", "every_n_steps"), [(1, 1), (1, 2), (2, 2), (2, 3)])
def test_rates_match_simulated_clock(tiny_backbone, tmp_path, monkeypatch, accumulate, every_n_steps):
    clock, logger = Clock(monkeypatch), CSVLogger(tmp_path)
    measured = Throughput(every_n_steps)
    trainer = tiny_trainer(
        tmp_path,
        clock,
        measured,
        logger=logger,
        accumulate_grad_batches=accumulate,
        limit_val_batches=1,
        val_check_interval=accumulate,
    )
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    found = logged_values(logger)
    assert list(found) == list(range(every_n_steps, 5, every_n_steps))
    for step, values in found.items():
        part = slice((step - every_n_steps) * accumulate, step * accumulate)
        seconds = (WAIT + WORK) * every_n_steps * accumulate
        assert values["tokens_per_second"] == pytest.approx(sum(clock.tokens[part]) / seconds)
        assert values["target_tokens_per_second"] == pytest.approx(sum(clock.targets[part]) / seconds)
        assert values["step_seconds"] == pytest.approx((WAIT + WORK) * accumulate)
        assert values["data_wait_seconds"] == pytest.approx(WAIT * accumulate)
    rest = slice(max(found) * accumulate, None)
    expected = (
        sum(clock.tokens[rest]) / ((WAIT + WORK) * len(clock.tokens[rest])) if clock.tokens[rest] else None
    )
    assert measured.tokens_per_second == pytest.approx(expected or found[4]["tokens_per_second"])


def flops_of_real_steps(folder, data, **adapter):
    """FLOPs per token of an epoch, counted while real steps run, without the masked half of attention."""
    module = tiny_module(folder, **adapter)
    module.configure_model()
    module.model.set_attn_implementation("eager")
    module._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, world_size=1)
    config, flops, tokens = module.model.config, 0, 0
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch["attention_mask"].all()
        with FlopCounterMode(display=False) as counter:
            module.training_step(batch, 0)["loss"].backward()
        # Attention has 2 matmuls forward and 4 backward, of 2 T² · width · heads FLOPs each; half are masked.
        length = batch["input_ids"].shape[1]
        flops += counter.get_total_flops() - 6 * length**2 * config.hidden_size * config.num_hidden_layers
        tokens += length
    return flops / tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "gate", "checkpointing"),
    [("hira", "token", False), ("hira", "token", True), ("lora", "none", False), ("dora", "static", False)],
)
def test_flops_match_real_steps(tiny_backbone, tmp_path, monkeypatch, update, gate, checkpointing):
    """One example per batch, so that there is no padding. Recomputed layers do not count."""
    data = tiny_data(tiny_backbone, batch_size=1, train=["everyday[:10]"])
    expected = flops_of_real_steps(tiny_backbone, data, update=update, gate=gate)
    clock, logger = Clock(monkeypatch), CSVLogger(tmp_path)
    module = tiny_module(tiny_backbone, update=update, gate=gate)
    module.backbone.gradient_checkpointing = checkpointing
    tiny_trainer(tmp_path, clock, Throughput(2, peak_tflops=0.5), logger=logger).fit(module, datamodule=data)
    for values in logged_values(logger).values():
        assert values["model_tflops"] == pytest.approx(
            values["tokens_per_second"] * expected / 1e12, rel=0.02
        )
        assert values["model_flops_utilization"] == pytest.approx(values["model_tflops"] / 0.5)


def test_utilization_is_divided_by_devices(monkeypatch):
    callback = Throughput(peak_tflops=1.0)
    callback._flops_per_token, callback._peak_flops = 2e9, 1e12
    callback._seconds, callback._steps, callback._tokens = 10.0, 5, 3000
    alone, four = (callback._measure(devices, torch.device("cpu")) for devices in (1, 4))
    assert alone["throughput/model_tflops"] == four["throughput/model_tflops"] == pytest.approx(0.6)
    assert alone["throughput/model_flops_utilization"] == pytest.approx(0.6)
    assert four["throughput/model_flops_utilization"] == pytest.approx(0.15)


def test_mean_micro_batch_preserves_tokens_and_squared_lengths():
    """Sequences of 2 and 6 tokens: Σ n² = 40, as for 8 tokens in sequences of 5."""
    steps = [
        SimpleNamespace(micro_batches=((0, 1), (2, 3)), supervised_tokens=6),
        SimpleNamespace(micro_batches=((4, 5), (6, 7)), supervised_tokens=10),
    ]
    examples = {"lengths": [[2], [6]] * 4, "gold": [0] * 8}
    batches = SimpleNamespace(steps=steps, table=SimpleNamespace(examples=examples))
    assert throughput.mean_micro_batch(batches) == MicroBatch(sequences=2, length=5, supervised_tokens=5)


def test_cpu_run_logs_no_utilization(tiny_backbone, tmp_path):
    logger = CSVLogger(tmp_path)
    tiny_trainer(tmp_path, Throughput(2), logger=logger).fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
    )
    held = int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
    for values in logged_values(logger).values():
        assert set(values) == {
            *("tokens_per_second", "target_tokens_per_second", "step_seconds", "data_wait_seconds"),
            *("model_tflops", "memory_gib"),
        }
        assert values["memory_gib"] == pytest.approx(held, rel=0.3)


def test_gpu_memory_is_peak_since_last_logging(tiny_backbone, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append("read") or 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    callback, gpu = Throughput(1), SimpleNamespace(device=torch.device("cuda", 0))
    trainer = SimpleNamespace(loggers=[], global_step=0, world_size=1, is_global_zero=True)
    callback.on_train_start(trainer, gpu)
    for trainer.global_step in (1, 2):
        callback.on_train_batch_end(trainer, gpu, None, {"step_tokens": 5, "step_supervised_tokens": 2}, 0)
        assert callback._logged["throughput/memory_gib"] == 3.0
    assert calls == ["reset", "read", "reset", "read", "reset"]


def test_turned_off_callback_does_not_reset_peak_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: pytest.fail("reset"))
    Throughput(0).on_train_start(
        SimpleNamespace(loggers=[], global_step=0), SimpleNamespace(device=torch.device("cuda", 0))
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AttributeError])
def test_model_with_uncountable_flops_trains_with_warning(
    tiny_backbone, tmp_path, monkeypatch, caplog, error
):
    def fail(*_):
        raise error("what its code says")

    monkeypatch.setattr(costs, "evaluate_objectives", fail)
    logger = CSVLogger(tmp_path)
    tiny_trainer(tmp_path, Throughput(2), logger=logger).fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
    )
    assert all(
        "model_tflops" not in values and "step_seconds" in values for values in logged_values(logger).values()
    )
    (line,) = [
        line
        for line in caplog.messages
        if "model_tflops is not logged, because the FLOPs cannot be counted" in line
    ]
    assert re.search(rf"LlamaForCausalLM .*\({error.__name__}: .*what its code says", line)


def test_throughput_does_not_change_training(tiny_backbone, tmp_path):
    """The same run with and without the callback."""

    def losses(*callbacks):
        L.seed_everything(1, verbose=False)
        module = tiny_module(tiny_backbone, dropout=0.3)
        trainer = tiny_trainer(tmp_path, *callbacks, logger=CSVLogger(tmp_path), max_steps=2)
        trainer.fit(module, datamodule=tiny_data(tiny_backbone))
        assert module.model.config._attn_implementation == "sdpa"
        return float(trainer.callback_metrics["train/loss"])

    assert losses(Throughput(1)) == losses()


def test_turned_off_callback_logs_nothing(tiny_backbone, tmp_path):
    logger = CSVLogger(tmp_path)
    tiny_trainer(tmp_path, Throughput(0), logger=logger, max_steps=2).fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
    )
    assert "throughput/" not in Path(logger.log_dir, "metrics.csv").read_text()


def test_negative_interval_is_rejected():
    with pytest.raises(
        ValueError, match=r"throughput\.every_n_steps: -1; accepted: at least 1, or 0 for never"
    ):
        Throughput(-1)


@pytest.mark.parametrize("peak", [0.0, -5.0, float("nan"), float("inf")])
def test_invalid_peak_is_rejected(peak):
    with pytest.raises(
        ValueError, match=rf"throughput\.peak_tflops: {peak}; accepted: a number above 0, or null"
    ):
        Throughput(peak_tflops=peak)
