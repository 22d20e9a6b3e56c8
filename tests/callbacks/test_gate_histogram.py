"""Gate histograms: counts against numpy, and what reaches TensorBoard and CSV files."""

import csv

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning.adapters.gates import GATES, TokenGateConfig
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.callbacks.gate_histogram import GateHistogram
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate
from gatera_lightning.gate_analysis.statistics import BINS, PHASES, GateStatistics, counted_tokens

EDGES = np.linspace(0, 1, BINS + 1)
FAMILIES = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def numpy_counts(z, batch):
    """``{phase: (counts (layers, bins), g of each layer, H of each layer)}`` token by token, in float64."""
    found = {}
    for phase in PHASES:
        values = [[] for _ in z]
        for row, example in enumerate(batch["example_ids"].tolist()):
            for token in range(z.shape[2]):
                real = batch["attention_mask"][row, token] == 1 and example >= 0
                if real and bool(batch["response_mask"][row, token]) == (phase == "response"):
                    for layer in range(len(z)):
                        values[layer].append(float(z[layer, row, token]))
        g = [1 / (1 + np.exp(-np.array(v))) for v in values]
        found[phase] = np.stack([np.histogram(x, EDGES)[0] for x in g]), g
    return found


def entropy(g):
    return -sum(p * np.log(np.where(p > 0, p, 1)) for p in (g, 1 - g))


def batch_of(mask, response, example_ids):
    return {
        "attention_mask": torch.tensor(mask),
        "response_mask": torch.tensor(response, dtype=torch.bool),
        "example_ids": torch.tensor(example_ids),
    }


def test_counts_by_hand():
    """Two layers; row 0 has a padded end, row 1 stands for no example: neither counts anywhere."""
    batch = batch_of([[1, 1, 1, 0], [1, 1, 1, 1]], [[0, 1, 1, 1], [0, 0, 1, 1]], [5, -1])
    z = torch.zeros(2, 2, 4)
    z[:, 0] = torch.tensor([[0.0, 100.0, -100.0, 3.0], [1.0, 0.0, 0.0, 3.0]])
    counts = GateStatistics(2)
    counts.update(z, counted_tokens(batch), batch["response_mask"])
    counts.update(z, counted_tokens(batch), batch["response_mask"])
    nonzero = {
        (phase, layer, b): int(counts.bins[phase, layer, b])
        for phase, layer, b in counts.bins.nonzero().tolist()
    }
    # g = 0.5 opens bin 25 of 50; g(100) = 1 belongs to the last bin, g(-100) = 0 to the first; g(1) = 0.731 to bin 36.
    assert nonzero == {(0, 0, 25): 2, (1, 0, 49): 2, (1, 0, 0): 2, (0, 1, 36): 2, (1, 1, 25): 4}
    assert counts.sums[0].flatten().tolist() == pytest.approx([1.0, 2 * 0.7310586, 2.0, 2.0])
    assert counts.sums[1].flatten().tolist() == pytest.approx(
        [2 * np.log(2), 2 * 0.5822034, 0.0, 4 * np.log(2)], abs=1e-6
    )
    assert counts.sums[2].flatten().tolist() == pytest.approx([0.5, 2 * 0.7310586**2, 2.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_equal_numpy(dtype):
    generator = torch.Generator().manual_seed(0)
    counts, expected = GateStatistics(3), {phase: 0 for phase in PHASES}
    for _ in range(2):
        lengths = torch.randint(1, 9, (5,), generator=generator)
        mask = (torch.arange(8) < lengths[:, None]).long()
        batch = batch_of(
            mask.tolist(), (torch.rand(5, 8, generator=generator) < 0.5).tolist(), [0, -1, 7, 3, -1]
        )
        z = (4 * torch.randn(3, 5, 8, generator=generator)).to(dtype)
        counts.update(z, counted_tokens(batch), batch["response_mask"])
        for phase, (bins, g) in numpy_counts(z, batch).items():
            sums = [[f(x).sum() for x in g] for f in (lambda x: x, entropy, np.square)]
            expected[phase] = expected[phase] + np.concatenate([bins.T, sums])
    for phase, name in enumerate(PHASES):
        np.testing.assert_array_equal(counts.bins[phase].T, expected[name][:BINS])
        np.testing.assert_allclose(counts.sums[:, phase], expected[name][BINS:], rtol=1e-6, atol=1e-6)


def test_packed_counts_by_hand():
    """Two lines of three and one rows: prompt, answer, prompt, answer, answer, nothing."""
    batch = batch_of(
        [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], [[0, 1, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]], [4, 0, 9, 2]
    )
    batch["position_ids"] = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 1, 0, 1, 2, 3]])
    z = torch.tensor([[[0.0, 1.0, 0.0, 100.0, 1.0, 7.0], [-100.0, 0.0, 7.0, 7.0, 7.0, 7.0]]])
    counts = GateStatistics(1)
    counts.update(z, counted_tokens(batch), batch["response_mask"])
    nonzero = {(phase, b): int(counts.bins[phase, 0, b]) for phase, b in counts.bins[:, 0].nonzero().tolist()}
    assert nonzero == {(0, 25): 2, (0, 0): 1, (1, 36): 2, (1, 49): 1, (1, 25): 1}
    assert counts.sums[0].flatten().tolist() == pytest.approx([1.0, 2 * 0.7310586 + 1.5])


def test_packed_rows_count_as_padded_ones():
    """Five rows in two lines, none of whose padding counts."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, 2), (1, 1), (7, 3), (2, 5), (3, 1))
    rows = [
        TokenSequence([5] * prompt, [6] * answer, number) for number, (prompt, answer) in enumerate(sizes)
    ]
    values = [4 * torch.randn(3, row.length, generator=generator) for row in rows]
    counts = {}
    for lines in (None, [[2, 1], [3, 0, 4]]):
        batch = collate(rows, pad_id=0, train_on="response", packs=lines)
        z = torch.full((3, *batch["input_ids"].shape), 9.0)
        for i, line in enumerate(lines or [[row] for row in range(5)]):
            laid = torch.cat([values[row] for row in line], 1)
            z[:, i, : laid.shape[1]] = laid
        counts[lines is None] = GateStatistics(3)
        counts[lines is None].update(z, counted_tokens(batch), batch["response_mask"])
    assert counts[False].bins.sum((1, 2)).tolist() == [3 * 17, 3 * 12]
    assert torch.equal(counts[False].bins, counts[True].bins)
    torch.testing.assert_close(counts[False].sums, counts[True].sums)


class Tape(L.Callback):
    """Every micro-batch's gate logits and batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append((outputs["gates"].stacked(batch["attention_mask"]), batch))


def fit(folder, root, logger, accumulate=1, every_n_steps=2, **adapter):
    """Four optimizer steps; returns the module and the tape."""
    tape, module = Tape(), tiny_module(folder, **adapter)
    trainer = tiny_trainer(
        root, tape, GateHistogram(every_n_steps), logger=logger, accumulate_grad_batches=accumulate
    )
    trainer.fit(module, datamodule=tiny_data(folder))
    return module, tape


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def groups_of(paths):
    """``{tag: the modules under it}``, by hand of the tiny backbone's two layers."""
    families = {name: [i for i, path in enumerate(paths) if path.endswith(name)] for name in FAMILIES}
    layers = {number: [i for i, path in enumerate(paths) if f"layers.{number}." in path] for number in (0, 1)}
    assert [len(found) for found in (*families.values(), *layers.values())] == [2] * 5 + [5] * 2
    return {
        "gates": list(range(10)),
        **{f"gate_families/{name}": found for name, found in families.items()},
        **{f"gate_layers/0{number}": found for number, found in layers.items()},
        **{f"gate_modules/{path}": [i] for i, path in enumerate(paths)},
    }


@pytest.mark.parametrize(("gate", "accumulate"), [("token", 1), ("token", 2), ("static", 1)])
def test_tensorboard_has_a_histogram_of_every_group_and_phase(tiny_backbone, tmp_path, gate, accumulate):
    logger = TensorBoardLogger(tmp_path, name="run")
    module, tape = fit(tiny_backbone, tmp_path, logger, accumulate, gate=GATES[gate](bias=1.3))
    accumulator = events(logger.log_dir)
    groups = groups_of(module.report.layers)
    assert set(accumulator.Tags()["histograms"]) == {
        f"{group}/{phase}" for group in groups for phase in PHASES
    }
    assert {tag.rpartition("/")[0] for tag in accumulator.Tags()["scalars"] if tag.startswith("gate")} == {
        f"{group}/{phase}" for group in groups if not group.startswith("gate_modules/") for phase in PHASES
    }
    for step in (2, 4):
        seen = tape.seen[(step - 2) * accumulate : step * accumulate]
        parts = [numpy_counts(z, batch) for z, batch in seen]
        for phase in PHASES:
            for group, modules in groups.items():
                (event,) = (e for e in accumulator.Histograms(f"{group}/{phase}") if e.step == step)
                value, g = (
                    event.histogram_value,
                    np.concatenate([part[phase][1][i] for part in parts for i in modules]),
                )
                found = dict(zip(np.round(value.bucket_limit, 6), value.bucket, strict=True))
                expected = sum(part[phase][0][i] for part in parts for i in modules)
                assert {limit: n for limit, n in found.items() if n} == {
                    round(float(limit), 6): n for limit, n in zip(EDGES[1:], expected, strict=True) if n
                }
                assert (value.num, value.sum, value.sum_squares) == pytest.approx(
                    (len(g), g.sum(), (g**2).sum()), rel=1e-6
                )
                if not group.startswith("gate_modules/"):
                    assert_scalars(accumulator, f"{group}/{phase}", step, g)


def assert_scalars(accumulator, prefix, step, g):
    def scalar(name):
        (event,) = (e for e in accumulator.Scalars(f"{prefix}/{name}") if e.step == step)
        return event.value

    names = ("mean", "share_closed", "share_open", "entropy")
    expected = (g.mean(), (g < 0.1).mean(), (g > 0.9).mean(), entropy(g).mean())
    assert tuple(map(scalar, names)) == pytest.approx(expected, rel=1e-6, abs=1e-6), prefix


def test_shares_of_closed_and_open_gates(tiny_backbone, tmp_path):
    """Gates that start at 0.007 and at 0.993 are counted as what they are."""
    for bias, share in ((-5.0, "share_closed"), (5.0, "share_open")):
        logger = TensorBoardLogger(tmp_path, name=share)
        fit(tiny_backbone, tmp_path, logger, gate=TokenGateConfig(bias=bias))
        assert [e.value for e in events(logger.log_dir).Scalars(f"gates/prompt/{share}")] == [1.0, 1.0]


def test_what_a_run_left_uncounted_is_no_part_of_the_next(tiny_backbone, tmp_path):
    """Four steps with a histogram after the third; then four of another model, with gates on other layers."""
    callback, logged = GateHistogram(3), []
    for settings in ({}, {"target_modules": ["o_proj"]}):
        tape, logger = Tape(), TensorBoardLogger(tmp_path, name=f"run{len(logged)}")
        trainer = tiny_trainer(tmp_path, tape, callback, logger=logger)
        trainer.fit(tiny_module(tiny_backbone, **settings), datamodule=tiny_data(tiny_backbone))
        (event,) = events(logger.log_dir).Histograms("gates/prompt")
        logged.append(event.histogram_value.num)
        expected = sum(
            part[0].sum() for z, batch in tape.seen[:3] for part in [numpy_counts(z, batch)["prompt"]]
        )
        assert logged[-1] == expected


def test_what_an_evaluated_checkpoint_had_counted_is_no_part_of_the_next_fit(tiny_backbone, tmp_path):
    callback = GateHistogram(3)
    trainer = tiny_trainer(tmp_path, callback)
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    trainer.save_checkpoint(tmp_path / "there.ckpt")
    tiny_trainer(tmp_path, callback).test(
        tiny_module(tiny_backbone), tiny_data(tiny_backbone), ckpt_path=tmp_path / "there.ckpt"
    )
    logger = TensorBoardLogger(tmp_path, name="next")
    tiny_trainer(tmp_path, callback, logger=logger).fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
    )
    assert [event.step for event in events(logger.log_dir).Histograms("gates/prompt")] == [3]


def test_other_loggers_keep_the_scalars_and_say_so_once(tiny_backbone, tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    fit(tiny_backbone, tmp_path, logger)
    assert caplog.text.count("gate histograms need the TensorBoard logger") == 1
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["gates/response/mean"]]
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(0 < float(row["gates/prompt/mean"]) < 1 for row in rows)
    assert sum(name.startswith("gate") for name in rows[0]) == (1 + 5 + 2) * 2 * 4


def test_beside_tensorboard_other_loggers_are_not_warned_about(tiny_backbone, tmp_path, caplog):
    fit(tiny_backbone, tmp_path, [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)])
    assert "gate histograms" not in caplog.text


@pytest.mark.parametrize("settings", [{"gate": "none"}, {"every_n_steps": 0}], ids=str)
def test_without_gates_or_switched_off_nothing_happens(tiny_backbone, tmp_path, caplog, settings):
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tiny_backbone, tmp_path, [logger, CSVLogger(tmp_path)], **settings)
    tags = events(logger.log_dir).Tags()
    assert tags["histograms"] == tags["images"] == []
    assert not [tag for tag in tags["scalars"] if tag.startswith("gate")]
    assert "gate histograms" not in caplog.text


def test_without_a_logger_training_runs(tiny_backbone, tmp_path):
    fit(tiny_backbone, tmp_path, logger=False)


class Remote(Logger):
    """As Weights & Biases: no folder, no TensorBoard writer."""

    name, version = "remote", "0"

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, set(metrics)))

    def log_hyperparams(self, *arguments, **options):
        pass


def test_a_logger_of_any_kind_gets_the_scalars(tiny_backbone, tmp_path, caplog):
    remote = Remote()
    fit(tiny_backbone, tmp_path, remote)
    assert caplog.text.count("gate histograms need the TensorBoard logger") == 1
    gates = {step: names for step, names in remote.logged if "gates/prompt/mean" in names}
    assert list(gates) == [2, 4]
    assert all("gate_families/q_proj/response/entropy" in names for names in gates.values())


# --- against σ(w·x + b) ---


class Seen(L.Callback):
    """What every adapted layer saw, and the gate it had then."""

    def on_train_start(self, trainer, module):
        self.seen = []
        for path, layer in adapted_linears(module.model).items():
            layer.register_forward_pre_hook(
                lambda layer, args, path=path: self.note(path, layer.gate, args[0])
            )

    def note(self, path, gate, x):
        parameters = [p.detach().double().numpy().copy() for p in gate.parameters()]
        weight, bias = sorted(parameters, key=np.size, reverse=True)
        z = x.detach().double().numpy() @ weight.ravel() + bias.ravel()
        self.seen.append((path, 1 / (1 + np.exp(-z))))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches = [*getattr(self, "batches", []), (batch, dict(self.seen))]
        self.seen.clear()


def test_a_run_has_the_gates_of_the_equation(tiny_backbone, tmp_path):
    """``g = σ(w·x + b)``, in float64 from what the layers saw, at tokens whose label or id says what they are."""
    seen, logger = Seen(), TensorBoardLogger(tmp_path, name="run")
    trainer = tiny_trainer(tmp_path, seen, GateHistogram(2), logger=logger)
    trainer.fit(
        tiny_module(tiny_backbone, gate=TokenGateConfig(bias=0.4)), datamodule=tiny_data(tiny_backbone)
    )
    accumulator = events(logger.log_dir)
    for step in (2, 4):
        found = {phase: {} for phase in PHASES}
        for batch, gates in seen.batches[step - 2 : step]:
            response = batch["labels"] != -100  # trained on the response alone
            padding = (batch["attention_mask"] == 0).numpy()
            assert padding.any()
            for phase, mask in zip(PHASES, ((~response).numpy() & ~padding, response.numpy()), strict=True):
                for path, g in gates.items():
                    found[phase].setdefault(path, []).append(g[mask])
        for phase in PHASES:
            assert len(found[phase]) == 10
            for path, parts in found[phase].items():
                g = np.concatenate(parts)
                (event,) = (
                    e for e in accumulator.Histograms(f"gate_modules/{path}/{phase}") if e.step == step
                )
                value = event.histogram_value
                assert value.num == len(g)
                assert value.sum / value.num == pytest.approx(g.mean(), abs=1e-6)


# --- shares over time ---


def test_a_picture_of_the_shares_at_every_histogram(tiny_backbone, tmp_path):
    logger, callback = TensorBoardLogger(tmp_path, name="run"), GateHistogram(2)
    trainer = tiny_trainer(tmp_path, callback, logger=logger)
    trainer.fit(
        tiny_module(tiny_backbone, gate=TokenGateConfig(bias=-2.0)), datamodule=tiny_data(tiny_backbone)
    )
    accumulator = events(logger.log_dir)
    assert accumulator.Tags()["images"] == ["gate_shares/layers"]
    pictures = accumulator.Images("gate_shares/layers")
    assert [picture.step for picture in pictures] == [2, 4]
    assert pictures[0].encoded_image_string != pictures[1].encoded_image_string
    history = callback.history
    assert (history.layers, history.steps, history.shares.shape) == ([0, 1], [2, 4], (2, 2, 2, 2))
    for column, step in enumerate((2, 4)):
        for phase, name in enumerate(PHASES):
            for share, statistic in enumerate(("share_closed", "share_open")):
                for layer in (0, 1):
                    tag = f"gate_layers/0{layer}/{name}/{statistic}"
                    (event,) = (e for e in accumulator.Scalars(tag) if e.step == step)
                    assert float(history.shares[column, phase, share, layer]) == pytest.approx(event.value)


def test_a_negative_interval_is_refused():
    with pytest.raises(
        ValueError, match=r"gate_histogram\.every_n_steps: -1; accepted: at least 1, or 0 for never"
    ):
        GateHistogram(-1)
