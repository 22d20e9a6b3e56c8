"""Tokens, steps and waiting against a clock that the test moves; operations against those of the real steps."""

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
    """Moves time: so long for each micro-batch's data, so long for its work, and long validations, which do not count."""

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


def readings(logger):
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
def test_totals_over_time(tiny_backbone, tmp_path, monkeypatch, accumulate, every_n_steps):
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
    found = readings(logger)
    assert list(found) == list(range(every_n_steps, 5, every_n_steps))
    for step, reading in found.items():
        part = slice((step - every_n_steps) * accumulate, step * accumulate)
        seconds = (WAIT + WORK) * every_n_steps * accumulate
        assert reading["tokens_per_second"] == pytest.approx(sum(clock.tokens[part]) / seconds)
        assert reading["target_tokens_per_second"] == pytest.approx(sum(clock.targets[part]) / seconds)
        assert reading["step_seconds"] == pytest.approx((WAIT + WORK) * accumulate)
        assert reading["data_wait_seconds"] == pytest.approx(WAIT * accumulate)
    rest = slice(max(found) * accumulate, None)
    expected = (
        sum(clock.tokens[rest]) / ((WAIT + WORK) * len(clock.tokens[rest])) if clock.tokens[rest] else None
    )
    assert measured.tokens_per_second == pytest.approx(expected or found[4]["tokens_per_second"])


def operations_of_real_steps(folder, data, **adapter):
    """Operations a token of an epoch, counted as its real steps run; attention's products but for the masked half."""
    module = tiny_module(folder, **adapter)
    module.configure_model()
    module.model.set_attn_implementation("eager")
    module._trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1)
    config, flops, tokens = module.model.config, 0, 0
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch["attention_mask"].all()
        with FlopCounterMode(display=False) as counter:
            module.training_step(batch, 0)["loss"].backward()
        # Two products forward, four backward, of 2 T² · width · heads operations each, and half of them are masked.
        length = batch["input_ids"].shape[1]
        flops += counter.get_total_flops() - 6 * length**2 * config.hidden_size * config.num_hidden_layers
        tokens += length
    return flops / tokens


@pytest.mark.parametrize(
    ("update", "gate", "checkpointing"),
    [("hira", "token", False), ("hira", "token", True), ("lora", "none", False), ("dora", "static", False)],
)
def test_operations_are_those_of_the_real_steps(
    tiny_backbone, tmp_path, monkeypatch, update, gate, checkpointing
):
    """One row a batch, so that nothing is padded. Recomputed layers are no use, and do not count."""
    data = tiny_data(tiny_backbone, batch_size=1, train=["everyday[:10]"])
    expected = operations_of_real_steps(tiny_backbone, data, update=update, gate=gate)
    clock, logger = Clock(monkeypatch), CSVLogger(tmp_path)
    module = tiny_module(tiny_backbone, update=update, gate=gate)
    module.backbone.gradient_checkpointing = checkpointing
    tiny_trainer(tmp_path, clock, Throughput(2, peak_tflops=0.5), logger=logger).fit(module, datamodule=data)
    for reading in readings(logger).values():
        assert reading["model_tflops"] == pytest.approx(
            reading["tokens_per_second"] * expected / 1e12, rel=0.02
        )
        assert reading["model_flops_utilization"] == pytest.approx(reading["model_tflops"] / 0.5)


def test_devices_share_what_is_used_of_them(monkeypatch):
    callback = Throughput(peak_tflops=1.0)
    callback._flops_per_token, callback._peak_flops = 2e9, 1e12
    callback._seconds, callback._steps, callback._tokens = 10.0, 5, 3000
    alone, four = (callback._read(devices, torch.device("cpu")) for devices in (1, 4))
    assert alone["throughput/model_tflops"] == four["throughput/model_tflops"] == pytest.approx(0.6)
    assert alone["throughput/model_flops_utilization"] == pytest.approx(0.6)
    assert four["throughput/model_flops_utilization"] == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA H200", torch.float16, 989),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA A100-SXM4-80GB", torch.float32, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16, None),
        ("a GPU to come", torch.bfloat16, None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_whole_name(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput._peak_tflops(torch.device("cuda", 0), dtype) == peak


def test_the_mean_micro_batch():
    """Rows of 2 and 6 tokens: attention costs 40, as 8 tokens would in rows of 5."""
    steps = [
        SimpleNamespace(micro_batches=((0, 1), (2, 3)), targets=6),
        SimpleNamespace(micro_batches=((4, 5), (6, 7)), targets=10),
    ]
    rows = {"lengths": [[2], [6]] * 4, "gold": [0] * 8}
    batches = SimpleNamespace(steps=steps, table=SimpleNamespace(rows=rows))
    assert throughput.mean_micro_batch(batches) == MicroBatch(sequences=2, length=5, supervised_tokens=5)


def test_a_cpu_says_what_is_done_but_not_of_how_much(tiny_backbone, tmp_path):
    logger = CSVLogger(tmp_path)
    tiny_trainer(tmp_path, Throughput(2), logger=logger).fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
    )
    held = int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
    for reading in readings(logger).values():
        assert set(reading) == {
            *("tokens_per_second", "target_tokens_per_second", "step_seconds", "data_wait_seconds"),
            *("model_tflops", "memory_gib"),
        }
        assert reading["memory_gib"] == pytest.approx(held, rel=0.3)


def test_memory_of_a_gpu_is_its_peak_between_two_readings(tiny_backbone, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append("read") or 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    callback, gpu = Throughput(1), SimpleNamespace(device=torch.device("cuda", 0))
    trainer = SimpleNamespace(loggers=[], global_step=0, world_size=1, is_global_zero=True)
    callback.on_train_start(trainer, gpu)
    for trainer.global_step in (1, 2):
        callback.on_train_batch_end(trainer, gpu, None, {"step_tokens": 5, "step_supervised_tokens": 2}, 0)
        assert callback._reading["throughput/memory_gib"] == 3.0
    assert calls == ["reset", "read", "reset", "read", "reset"]


def test_switched_off_it_leaves_the_peak_to_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: pytest.fail("reset"))
    Throughput(0).on_train_start(
        SimpleNamespace(loggers=[], global_step=0), SimpleNamespace(device=torch.device("cuda", 0))
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AttributeError])
def test_a_model_that_cannot_be_counted_is_trained_all_the_same(
    tiny_backbone, tmp_path, monkeypatch, caplog, error
):
    def refuse(*_):
        raise error("what its code says")

    monkeypatch.setattr(costs, "_loss", refuse)
    logger = CSVLogger(tmp_path)
    tiny_trainer(tmp_path, Throughput(2), logger=logger).fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
    )
    assert all(
        "model_tflops" not in reading and "step_seconds" in reading for reading in readings(logger).values()
    )
    (line,) = [
        line for line in caplog.messages if "no operations a second, for they cannot be counted" in line
    ]
    assert re.search(rf"LlamaForCausalLM .*\({error.__name__}: .*what its code says", line)


def test_it_changes_nothing(tiny_backbone, tmp_path):
    """A callback only watches: the same run with and without it."""

    def losses(*callbacks):
        L.seed_everything(1, verbose=False)
        module = tiny_module(tiny_backbone, dropout=0.3)
        trainer = tiny_trainer(tmp_path, *callbacks, logger=CSVLogger(tmp_path), max_steps=2)
        trainer.fit(module, datamodule=tiny_data(tiny_backbone))
        assert module.model.config._attn_implementation == "sdpa"
        return float(trainer.callback_metrics["train/loss"])

    assert losses(Throughput(1)) == losses()


def test_switched_off(tiny_backbone, tmp_path):
    logger = CSVLogger(tmp_path)
    tiny_trainer(tmp_path, Throughput(0), logger=logger, max_steps=2).fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
    )
    assert "throughput/" not in Path(logger.log_dir, "metrics.csv").read_text()


def test_a_negative_interval_is_refused():
    with pytest.raises(
        ValueError, match=r"throughput\.every_n_steps: -1; accepted: at least 1, or 0 for never"
    ):
        Throughput(-1)


@pytest.mark.parametrize("peak", [0.0, -5.0, float("nan"), float("inf")])
def test_a_peak_that_is_none_is_refused(peak):
    with pytest.raises(
        ValueError, match=rf"throughput\.peak_tflops: {peak}; accepted: a number above 0, or null"
    ):
        Throughput(peak_tflops=peak)
