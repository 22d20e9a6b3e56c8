"""Tests of choosing by validation: accuracies, early stopping and the best checkpoint."""

import json

import lightning as L
import pytest
import torch
from tiny_backbone import NO_PICTURES, sample_rows, tiny_args, tiny_data, tiny_module, tiny_trainer

import gatera_lightning.cli.lightning_cli
import gatera_lightning.training.model_loading
from gatera_lightning import adapter_parameters
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.callbacks.early_stopping import OptionalEarlyStopping
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.cli.main import main

SCORES = ("sum", "per_token", "per_character")


@pytest.fixture(scope="module")
def trained(tiny_backbone):
    """A module whose adapter has random values."""
    module = tiny_module(tiny_backbone, gate=TokenGateConfig(bias=1.0))
    module.configure_model()
    with torch.no_grad():
        for parameter in adapter_parameters(module.model).values():
            parameter.add_(
                0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return module


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of fourteen examples, to validate and to test on."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(sample_rows("test")[:14]))
    return [str(path)]


def validated(module, root, rows, **settings):
    (metrics,) = tiny_trainer(root, limit_val_batches=1.0).validate(
        module, datamodule=tiny_data(module.backbone.id, validation=rows, **settings), verbose=False
    )
    return metrics


@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize("eval_batch_size", [1, 9])
def test_validation_accuracies_match_test_on_same_examples(
    trained, rows, tmp_path, train_on, eval_batch_size
):
    settings = {"train_on": train_on, "eval_batch_size": eval_batch_size, "rank_validation": True}
    found = validated(trained, tmp_path, rows, **settings)
    trainer = tiny_trainer(tmp_path, EvaluationReport())
    (expected,) = trainer.test(trained, datamodule=tiny_data(trained.backbone.id, test=rows), verbose=False)
    assert set(found) == {"val/loss", *(f"val/accuracy_{score}" for score in SCORES)}
    for score in SCORES:
        assert found[f"val/accuracy_{score}"] == pytest.approx(expected[f"test/accuracy_{score}"])
    assert len({found[f"val/accuracy_{score}"] for score in SCORES}) > 1
    if train_on == "response":
        assert found["val/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_validation_loss_ignores_wrong_candidates(trained, rows, tmp_path, train_on):
    ranked, plain = (
        validated(trained, tmp_path, rows, train_on=train_on, rank_validation=rank) for rank in (True, False)
    )
    assert set(plain) == {"val/loss"}
    assert ranked["val/loss"] == pytest.approx(plain["val/loss"], rel=1e-6)


class RecordMetrics(L.Callback):
    """Records the metrics of every validation, by optimizer step."""

    def __init__(self):
        self.found = {}

    def on_validation_end(self, trainer, pl_module):
        self.found[trainer.global_step] = {
            name: float(value) for name, value in trainer.callback_metrics.items()
        }


def fit(folder, root, *callbacks, lr=1e-2, steps=5, **settings):
    """Train for a few steps with a validation after each; returns the trainer and the metrics by step."""
    L.seed_everything(0, verbose=False)
    module, recording = tiny_module(folder), RecordMetrics()
    module.optimizer.lr = lr
    trainer = tiny_trainer(
        root, recording, *callbacks, max_steps=steps, limit_val_batches=1.0, val_check_interval=1
    )
    trainer.fit(module, datamodule=tiny_data(folder, **settings))
    return trainer, recording.found


@pytest.mark.parametrize(
    ("patience", "lr", "last_step"),
    [(1, 0.0, 2), (3, 0.0, 4), (1, 1e-2, 5), (None, 0.0, 5)],
    ids=["no improvement", "no improvement, more patience", "improvement", "off"],
)
def test_patience_ends_run_without_improvement(tiny_backbone, tmp_path, patience, lr, last_step):
    trainer, found = fit(tiny_backbone, tmp_path, OptionalEarlyStopping(patience=patience), lr=lr)
    losses = [metrics["val/loss"] for metrics in found.values()]
    assert (trainer.global_step, list(found)) == (last_step, list(range(1, last_step + 1)))
    assert (len(set(losses)) == 1) == (lr == 0.0)
    assert lr == 0.0 or losses == sorted(losses, reverse=True)


def test_improvement_below_min_delta_does_not_count(tiny_backbone, tmp_path):
    trainer, found = fit(tiny_backbone, tmp_path, OptionalEarlyStopping(patience=1, min_delta=10.0))
    assert trainer.global_step == 2
    assert found[2]["val/loss"] < found[1]["val/loss"]


def test_run_can_stop_by_accuracy(tiny_backbone, tmp_path):
    stopping = OptionalEarlyStopping(patience=2, monitor="val/accuracy_sum", mode="max")
    trainer, found = fit(tiny_backbone, tmp_path, stopping, lr=0.0, rank_validation=True)
    assert (trainer.global_step, len(found)) == (3, 3)


@pytest.mark.parametrize("patience", [0, -1])
def test_patience_below_one_is_rejected(patience):
    with pytest.raises(
        ValueError,
        match=rf"early_stopping\.patience: {patience}; accepted: null, or an integer of at least 1",
    ):
        OptionalEarlyStopping(patience=patience)


def test_most_accurate_checkpoint_is_kept(tiny_backbone, tmp_path):
    keeping = AdapterCheckpoint(monitor="val/accuracy_per_token", mode="max")
    _, found = fit(
        tiny_backbone, tmp_path, keeping, lr=1.0, steps=5, rank_validation=True, validation=["everyday[:20]"]
    )
    accuracies = {step: metrics["val/accuracy_per_token"] for step, metrics in found.items()}
    best = max(accuracies, key=accuracies.__getitem__)  # the first one if several are equal
    assert accuracies[best] > accuracies[5]  # otherwise keeping the last would pass as well
    assert accuracies[best] > accuracies[1]
    assert float(keeping.best_model_score) == pytest.approx(accuracies[best])
    assert keeping.best_model_path.endswith(f"best-step={best}.ckpt")
    assert torch.load(keeping.best_model_path, weights_only=True)["global_step"] == best


# --- command line ---


@pytest.fixture
def args(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), *NO_PICTURES]


def test_accuracy_monitor_without_ranking_is_rejected_before_loading(args, capsys, monkeypatch):
    def loaded(*_):
        raise AssertionError("weights or tokenizer were loaded")

    monkeypatch.setattr(gatera_lightning.training.model_loading, "load_backbone", loaded)
    monkeypatch.setattr(gatera_lightning.cli.lightning_cli, "load_tokenizer", loaded)
    wrong = ["--checkpoint.monitor", "val/accuracy_per_token", "--early_stopping.monitor", "val/accuracy_sum"]
    assert main([*args, *wrong, "--early_stopping.patience", "0"]) == 2
    error = capsys.readouterr().err
    needs = "is logged only with data.rank_validation: true; accepted: that setting, or val/loss"
    assert f"checkpoint.monitor: val/accuracy_per_token {needs}" in error
    assert "early_stopping.patience: 0; accepted: null, or an integer of at least 1" in error
    assert main([*args, *wrong]) == 2
    assert f"early_stopping.monitor: val/accuracy_sum {needs}" in capsys.readouterr().err


def test_command_line_run_monitors_accuracy_and_stops(args, tmp_path):
    flags = ["--data.init_args.rank_validation", "true", "--trainer.val_check_interval", "1"]
    flags += ["--checkpoint.monitor", "val/accuracy_per_token", "--checkpoint.mode", "max"]
    assert main([*args, *flags, "--early_stopping.patience", "1", "--early_stopping.min_delta", "99"]) == 0
    folder = tmp_path / "runs" / "quickstart" / "version_0" / "checkpoints"
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    (state,) = (state for name, state in last["callbacks"].items() if name.startswith("AdapterCheckpoint"))
    assert (state["monitor"], 0 <= float(state["best_model_score"]) <= 1) == ("val/accuracy_per_token", True)


def test_patience_is_not_restored_from_checkpoint():
    saved = OptionalEarlyStopping(patience=2).state_dict() | {"wait_count": 1}
    resumed = OptionalEarlyStopping(patience=5)
    resumed.load_state_dict(saved)
    assert (resumed.patience, resumed.wait_count) == (5, 1)
    off = OptionalEarlyStopping().state_dict()
    assert off == {}
    resumed.load_state_dict(off)
    assert resumed.patience == 5


@pytest.mark.parametrize(("monitor", "mode"), [("val/loss", "min"), ("val/accuracy_per_token", "max")])
def test_default_mode_is_max_for_accuracies(monitor, mode):
    assert OptionalEarlyStopping(patience=1, monitor=monitor).mode == mode
    assert AdapterCheckpoint(monitor=monitor).mode == mode
    assert AdapterCheckpoint(monitor=monitor, mode="min").mode == "min"
