"""Tests of GateHistogram: what it logs to each logger, and what a run leaves for the next."""

import csv

import lightning as L
import numpy as np
import pytest
import torch
from gate_counts import EDGES, count_gates, entropy
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning.adapters.gates import GATES, HardGateConfig, ThresholdGateConfig, TokenGateConfig
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.callbacks.gate_histogram import GateHistogram
from gatera_lightning.errors import CheckpointError
from gatera_lightning.gate_analysis.statistics import PHASES

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


class RecordGates(L.Callback):
    """Records the gate logits and the batch of every micro-batch."""

    def __init__(self):
        self.recorded = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.recorded.append((outputs["gates"].stacked(batch["attention_mask"]), batch))


def fit(folder, root, logger, accumulate=1, every_n_steps=2, **adapter):
    """Train for four optimizer steps; returns the module and the recorded gates."""
    recording, module = RecordGates(), tiny_module(folder, **adapter)
    trainer = tiny_trainer(
        root, recording, GateHistogram(every_n_steps), logger=logger, accumulate_grad_batches=accumulate
    )
    trainer.fit(module, datamodule=tiny_data(folder))
    return module, recording.recorded


def read_events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def groups_of(paths):
    """``{tag: indices of modules}`` for the two layers of the tiny backbone."""
    projections = {name: [i for i, path in enumerate(paths) if path.endswith(name)] for name in PROJECTIONS}
    layers = {number: [i for i, path in enumerate(paths) if f"layers.{number}." in path] for number in (0, 1)}
    assert [len(found) for found in (*projections.values(), *layers.values())] == [2] * 5 + [5] * 2
    return {
        "gates": list(range(10)),
        **{f"gate_families/{name}": found for name, found in projections.items()},
        **{f"gate_layers/0{number}": found for number, found in layers.items()},
        **{f"gate_modules/{path}": [i] for i, path in enumerate(paths)},
    }


@pytest.mark.parametrize(("gate", "accumulate"), [("token", 1), ("token", 2), ("static", 1)])
def test_histograms_and_scalars_match_recorded_gates(tiny_backbone, tmp_path, gate, accumulate):
    logger = TensorBoardLogger(tmp_path, name="run")
    module, recorded = fit(tiny_backbone, tmp_path, logger, accumulate, gate=GATES[gate](bias=1.3))
    events = read_events(logger.log_dir)
    groups = groups_of(module.report.layers)
    assert set(events.Tags()["histograms"]) == {f"{group}/{phase}" for group in groups for phase in PHASES}
    assert {tag.rpartition("/")[0] for tag in events.Tags()["scalars"] if tag.startswith("gate")} == {
        f"{group}/{phase}" for group in groups if not group.startswith("gate_modules/") for phase in PHASES
    }
    for step in (2, 4):
        parts = [count_gates(z, batch) for z, batch in recorded[(step - 2) * accumulate : step * accumulate]]
        for phase in PHASES:
            for group, modules in groups.items():
                (event,) = (e for e in events.Histograms(f"{group}/{phase}") if e.step == step)
                value = event.histogram_value
                g = np.concatenate([part[phase][1][i] for part in parts for i in modules])
                expected = sum(part[phase][0][i] for part in parts for i in modules)
                buckets = zip(np.round(value.bucket_limit, 6), value.bucket, strict=True)
                assert {limit: n for limit, n in buckets if n} == {
                    round(float(limit), 6): n for limit, n in zip(EDGES[1:], expected, strict=True) if n
                }
                assert (value.num, value.sum, value.sum_squares) == pytest.approx(
                    (len(g), g.sum(), (g**2).sum()), rel=1e-6
                )
                if not group.startswith("gate_modules/"):
                    assert_scalars(events, f"{group}/{phase}", step, g)


def assert_scalars(events, prefix, step, g):
    def scalar(name):
        (event,) = (e for e in events.Scalars(f"{prefix}/{name}") if e.step == step)
        return event.value

    names = ("mean", "share_closed", "share_open", "entropy")
    expected = (g.mean(), (g < 0.1).mean(), (g > 0.9).mean(), entropy(g).mean())
    assert tuple(map(scalar, names)) == pytest.approx(expected, rel=1e-6, abs=1e-6), prefix


@pytest.mark.parametrize(("bias", "share"), [(-5.0, "share_closed"), (5.0, "share_open")])
def test_shares_count_saturated_gates(tiny_backbone, tmp_path, bias, share):
    """Gates start at 0.007 or at 0.993."""
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tiny_backbone, tmp_path, logger, gate=TokenGateConfig(bias=bias))
    assert [e.value for e in read_events(logger.log_dir).Scalars(f"gates/prompt/{share}")] == [1.0, 1.0]


@pytest.mark.parametrize("gate", [HardGateConfig(bias=0.1), HardGateConfig(bias=0.0), ThresholdGateConfig()])
def test_gates_that_decide_have_the_share_of_skipped_tokens(tiny_backbone, tmp_path, gate):
    """Hard gates with b = 0 start at z = 0, which evaluation closes, and thresholds of 0 keep all."""
    logger = TensorBoardLogger(tmp_path, name="run")
    module, recorded = fit(tiny_backbone, tmp_path, logger, every_n_steps=1, gate=gate)
    events, groups = read_events(logger.log_dir), groups_of(module.report.layers)
    for step, (z, batch) in enumerate(recorded, 1):
        for group in ("gates", "gate_families/q_proj", "gate_layers/01"):
            (event,) = (e for e in events.Scalars(f"{group}/response/share_skipped") if e.step == step)
            counted = batch["attention_mask"].bool() & batch["response_mask"]
            counted &= (batch["example_ids"] >= 0).unsqueeze(1)
            expected = (z[groups[group]][:, counted] <= 0).double().mean()
            assert event.value == pytest.approx(float(expected)), (group, step)
    start = float((recorded[0][0] <= 0).double().mean())
    assert start == (gate.kind == "hard" and gate.bias == 0)


def test_other_gates_skip_no_token(tiny_backbone, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tiny_backbone, tmp_path, logger)
    assert not [tag for tag in read_events(logger.log_dir).Tags()["scalars"] if "skipped" in tag]


def test_second_run_starts_without_counts_of_first(tiny_backbone, tmp_path):
    """Four steps with a histogram after the third; then four of a model with gates on other layers."""
    callback = GateHistogram(3)
    for number, settings in enumerate(({}, {"target_modules": ["o_proj"]})):
        recording, logger = RecordGates(), TensorBoardLogger(tmp_path, name=f"run{number}")
        trainer = tiny_trainer(tmp_path, recording, callback, logger=logger)
        trainer.fit(tiny_module(tiny_backbone, **settings), datamodule=tiny_data(tiny_backbone))
        (event,) = read_events(logger.log_dir).Histograms("gates/prompt")
        counts = [count_gates(z, batch)["prompt"][0] for z, batch in recording.recorded[:3]]
        assert event.histogram_value.num == sum(part.sum() for part in counts)


def test_fit_after_evaluation_starts_without_counts_of_checkpoint(tiny_backbone, tmp_path):
    callback = GateHistogram(3)
    trainer = tiny_trainer(tmp_path, callback)
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    trainer.save_checkpoint(tmp_path / "evaluated.ckpt")
    tiny_trainer(tmp_path, callback).test(
        tiny_module(tiny_backbone), tiny_data(tiny_backbone), ckpt_path=tmp_path / "evaluated.ckpt"
    )
    logger = TensorBoardLogger(tmp_path, name="next")
    tiny_trainer(tmp_path, callback, logger=logger).fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
    )
    assert [event.step for event in read_events(logger.log_dir).Histograms("gates/prompt")] == [3]


def test_csv_logger_gets_scalars_and_one_warning(tiny_backbone, tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    fit(tiny_backbone, tmp_path, logger)
    assert caplog.text.count("gate histograms need the TensorBoard logger") == 1
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["gates/response/mean"]]
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(0 < float(row["gates/prompt/mean"]) < 1 for row in rows)
    assert sum(name.startswith("gate") for name in rows[0]) == (1 + 5 + 2) * 2 * 4


class RemoteLogger(Logger):
    """A logger like Weights & Biases: without a folder and without a TensorBoard writer."""

    name, version = "remote", "0"

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, set(metrics)))

    def log_hyperparams(self, *arguments, **options):
        pass


def test_remote_logger_gets_scalars_and_one_warning(tiny_backbone, tmp_path, caplog):
    logger = RemoteLogger()
    fit(tiny_backbone, tmp_path, logger)
    assert caplog.text.count("gate histograms need the TensorBoard logger") == 1
    gates = {step: names for step, names in logger.logged if "gates/prompt/mean" in names}
    assert list(gates) == [2, 4]
    assert all("gate_families/q_proj/response/entropy" in names for names in gates.values())


def test_no_warning_if_one_logger_is_tensorboard(tiny_backbone, tmp_path, caplog):
    fit(tiny_backbone, tmp_path, [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)])
    assert "gate histograms" not in caplog.text


@pytest.mark.parametrize("settings", [{"gate": "none"}, {"every_n_steps": 0}], ids=str)
def test_nothing_is_logged_without_gates_or_turned_off(tiny_backbone, tmp_path, caplog, settings):
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tiny_backbone, tmp_path, [logger, CSVLogger(tmp_path)], **settings)
    tags = read_events(logger.log_dir).Tags()
    assert tags["histograms"] == tags["images"] == []
    assert not [tag for tag in tags["scalars"] if tag.startswith("gate")]
    assert "gate histograms" not in caplog.text


def test_training_runs_without_logger(tiny_backbone, tmp_path):
    fit(tiny_backbone, tmp_path, logger=False)


class RecordInputs(L.Callback):
    """Computes σ(w·x + b) in float64 from the input and the gate of every adapted layer."""

    def on_train_start(self, trainer, module):
        self.gates, self.batches = [], []
        for path, layer in adapted_linears(module.model).items():
            layer.register_forward_pre_hook(
                lambda layer, args, path=path: self.compute(path, layer.gate, args[0])
            )

    def compute(self, path, gate, x):
        parameters = [p.detach().double().numpy().copy() for p in gate.parameters()]
        weight, bias = sorted(parameters, key=np.size, reverse=True)
        z = x.detach().double().numpy() @ weight.ravel() + bias.ravel()
        self.gates.append((path, 1 / (1 + np.exp(-z))))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append((batch, dict(self.gates)))
        self.gates.clear()


def test_histograms_match_gates_computed_from_layer_inputs(tiny_backbone, tmp_path):
    """The labels decide which tokens belong to the response."""
    recording, logger = RecordInputs(), TensorBoardLogger(tmp_path, name="run")
    trainer = tiny_trainer(tmp_path, recording, GateHistogram(2), logger=logger)
    trainer.fit(
        tiny_module(tiny_backbone, gate=TokenGateConfig(bias=0.4)), datamodule=tiny_data(tiny_backbone)
    )
    events = read_events(logger.log_dir)
    for step in (2, 4):
        found = {phase: {} for phase in PHASES}
        for batch, gates in recording.batches[step - 2 : step]:
            response = (batch["labels"] != -100).numpy()  # the response alone is supervised
            padding = (batch["attention_mask"] == 0).numpy()
            assert padding.any()
            for phase, mask in zip(PHASES, (~response & ~padding, response), strict=True):
                for path, g in gates.items():
                    found[phase].setdefault(path, []).append(g[mask])
        for phase in PHASES:
            assert len(found[phase]) == 10
            for path, parts in found[phase].items():
                g = np.concatenate(parts)
                (event,) = (e for e in events.Histograms(f"gate_modules/{path}/{phase}") if e.step == step)
                value = event.histogram_value
                assert value.num == len(g)
                assert value.sum / value.num == pytest.approx(g.mean(), abs=1e-6)


def test_gate_shares_are_drawn_with_every_histogram(tiny_backbone, tmp_path):
    logger, callback = TensorBoardLogger(tmp_path, name="run"), GateHistogram(2)
    trainer = tiny_trainer(tmp_path, callback, logger=logger)
    trainer.fit(
        tiny_module(tiny_backbone, gate=TokenGateConfig(bias=-2.0)), datamodule=tiny_data(tiny_backbone)
    )
    events = read_events(logger.log_dir)
    assert events.Tags()["images"] == ["gate_shares/layers"]
    pictures = events.Images("gate_shares/layers")
    assert [picture.step for picture in pictures] == [2, 4]
    assert pictures[0].encoded_image_string != pictures[1].encoded_image_string
    history = callback.history
    assert (history.layers, history.steps, history.shares.shape) == ([0, 1], [2, 4], (2, 2, 2, 2))
    for column, step in enumerate((2, 4)):
        for phase, name in enumerate(PHASES):
            for share, statistic in enumerate(("share_closed", "share_open")):
                for layer in (0, 1):
                    tag = f"gate_layers/0{layer}/{name}/{statistic}"
                    (event,) = (e for e in events.Scalars(tag) if e.step == step)
                    assert float(history.shares[column, phase, share, layer]) == pytest.approx(event.value)


def test_negative_interval_is_rejected():
    with pytest.raises(
        ValueError, match=r"gate_histogram\.every_n_steps: -1; accepted: at least 1, or 0 for never"
    ):
        GateHistogram(-1)


def test_counts_of_a_module_without_a_gate_are_refused(tiny_backbone, tmp_path):
    """The names of a checkpoint are compared with the model's, before the first step."""
    trainer = tiny_trainer(tmp_path, GateHistogram(100), max_steps=2)
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    checkpoint = torch.load(tmp_path / "two.ckpt", weights_only=True)
    checkpoint["callbacks"]["GateHistogram"]["names"][0] = "model.other"
    torch.save(checkpoint, tmp_path / "two.ckpt")
    trainer = tiny_trainer(tmp_path, GateHistogram(100))
    with pytest.raises(CheckpointError, match=r"two\.ckpt: .*GateHistogram\.names has 'model\.other', which"):
        trainer.fit(
            tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone), ckpt_path=tmp_path / "two.ckpt"
        )
