"""Gates and samples reach Weights & Biases and MLflow, read back by what these libraries store."""

import csv
import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbone import tiny_data, tiny_module, tiny_trainer
from wandb_files import history, media

from gatera_lightning.callbacks.gate_heatmap import GateHeatmap
from gatera_lightning.callbacks.gate_histogram import GateHistogram
from gatera_lightning.callbacks.generated_samples import GeneratedSamples

HOSTILE = "<script>alert(1)</script> & \x1b[31mred\x1b]0;title\x07 \u202eback"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\u001b[31mred\\u001b]0;title\\u0007 \\u202eback"
STEPS = [2, 4]
"""At which steps gates are counted, heatmaps are drawn (also at 1) and samples are generated."""


@pytest.fixture(scope="module")
def quiet_libraries(tmp_path_factory):
    """Weights & Biases and MLflow keep to temporary folders, to this machine, and to themselves."""
    folder = tmp_path_factory.mktemp("libraries")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(folder))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield


def fit(backbone, root, loggers):
    callbacks = [GateHistogram(2), GateHeatmap(2, [HOSTILE]), GeneratedSamples([HOSTILE], max_new_tokens=5)]
    trainer = tiny_trainer(
        root, *callbacks, logger=loggers, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=0
    )
    trainer.fit(tiny_module(backbone), datamodule=tiny_data(backbone))


def tensorboard(folder):
    """What the same run logs to TensorBoard: the reference."""
    sizes = {"tensors": 0, "images": 0, "scalars": 0, "histograms": 0}
    events = EventAccumulator(str(folder), size_guidance=sizes)
    events.Reload()
    return events


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def expected_pictures(events):
    return {
        tag: {event.step: pixels(event.encoded_image_string) for event in events.Images(tag)}
        for tag in ("gate_heatmap/1", "gate_shares/layers", "samples/1")
    }


def expected_html(events):
    return {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("samples/1/text_summary")
    }


@pytest.fixture(scope="module")
def wandb_run(quiet_libraries, tiny_backbone, tmp_path_factory):
    """One run with TensorBoard and Weights & Biases."""
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    folder = tmp_path_factory.mktemp("wandb")
    logger = WandbLogger(project="gatera", save_dir=folder, offline=True)
    reference = TensorBoardLogger(folder, default_hp_metric=False)
    fit(tiny_backbone, folder, [logger, reference])
    wandb.teardown()  # ends the run and the service, which may write its last records after the run
    return SimpleNamespace(folder=folder, history=history(folder), events=tensorboard(reference.log_dir))


@pytest.fixture(scope="module")
def mlflow_run(quiet_libraries, tiny_backbone, tmp_path_factory):
    """One run with TensorBoard and MLflow."""
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    logger = MLFlowLogger("gatera", tracking_uri=f"file:{folder / 'store'}")
    reference = TensorBoardLogger(folder, default_hp_metric=False)
    fit(tiny_backbone, folder, [logger, reference])

    def artifacts(path=None):
        entries = logger.experiment.list_artifacts(logger.run_id, path)
        below = [file for entry in entries if entry.is_dir for file in artifacts(entry.path)]
        return [*(entry.path for entry in entries if not entry.is_dir), *below]

    def read(path):
        return Path(logger.experiment.download_artifacts(logger.run_id, path, str(folder))).read_bytes()

    events = tensorboard(reference.log_dir)
    return SimpleNamespace(logger=logger, artifacts=artifacts(), read=read, events=events)


def test_wandb_gets_the_scalars_of_tensorboard(wandb_run):
    tags = [tag for tag in wandb_run.events.Tags()["scalars"] if tag != "epoch"]
    assert {"gates/response/mean", "train/loss", "val/loss", "gate_families/q_proj/prompt/entropy"} <= {*tags}
    for tag in tags:
        expected = {event.step: event.value for event in wandb_run.events.Scalars(tag)}
        assert wandb_run.history[tag] == pytest.approx(expected, rel=1e-6, nan_ok=True), tag


def test_wandb_gets_histograms(wandb_run):
    tags = wandb_run.events.Tags()["histograms"]
    assert len(tags) > 4
    for tag in tags:
        for event in wandb_run.events.Histograms(tag):
            found = wandb_run.history[tag][event.step]
            assert found["_type"] == "histogram"
            assert found["values"] == event.histogram_value.bucket
            assert found["bins"] == pytest.approx([0, *event.histogram_value.bucket_limit])


def test_wandb_gets_pictures(wandb_run):
    for tag, by_step in expected_pictures(wandb_run.events).items():
        assert list(wandb_run.history[tag]) == list(by_step)
        for step, expected in by_step.items():
            (name,) = wandb_run.history[tag][step]["filenames"]
            assert np.array_equal(pixels(media(wandb_run.folder, name)), expected)


def test_wandb_gets_samples_as_escaped_text(wandb_run):
    expected = expected_html(wandb_run.events)
    assert list(wandb_run.history["samples/1/text"]) == list(expected) == STEPS
    for step, text in expected.items():
        page = media(wandb_run.folder, wandb_run.history["samples/1/text"][step]["path"]).decode()
        assert page.endswith(text)
        assert text.startswith(f"<blockquote>{ESCAPED}</blockquote><p>")
        assert "<script" not in page
        assert "\x1b" not in page


def test_mlflow_gets_the_scalars_of_tensorboard(mlflow_run):
    tags = [tag for tag in mlflow_run.events.Tags()["scalars"] if tag != "epoch"]
    assert {"gates/response/mean", "train/loss", "val/loss", "gate_families/q_proj/prompt/entropy"} <= {*tags}
    client, run = mlflow_run.logger.experiment, mlflow_run.logger.run_id
    for tag in tags:
        expected = {event.step: event.value for event in mlflow_run.events.Scalars(tag)}
        found = {metric.step: metric.value for metric in client.get_metric_history(run, tag)}
        assert found == pytest.approx(expected, rel=1e-6, nan_ok=True), tag


def test_mlflow_gets_histograms_as_json(mlflow_run):
    stored = [path for path in mlflow_run.artifacts if path.startswith("gate_histograms/")]
    assert sorted(stored) == [f"gate_histograms/step_{step:08d}.json" for step in STEPS]
    tags = mlflow_run.events.Tags()["histograms"]
    for step in STEPS:
        found = json.loads(mlflow_run.read(f"gate_histograms/step_{step:08d}.json"))
        for tag in tags:
            (event,) = (event for event in mlflow_run.events.Histograms(tag) if event.step == step)
            assert found[tag]["counts"] == event.histogram_value.bucket
            assert found[tag]["limits"] == pytest.approx(list(event.histogram_value.bucket_limit))
            assert found[tag]["total"] == pytest.approx(event.histogram_value.sum)
            assert found[tag]["squares"] == pytest.approx(event.histogram_value.sum_squares)


def test_mlflow_gets_pictures(mlflow_run):
    for tag, by_step in expected_pictures(mlflow_run.events).items():
        for step, expected in by_step.items():
            prefix = f"images/{tag.replace('/', '~')}"
            (path,) = (
                path
                for path in mlflow_run.artifacts
                if path.startswith(prefix) and f"step+{step}+" in path and path.endswith(".png")
            )
            assert np.array_equal(pixels(mlflow_run.read(path)), expected)


def test_mlflow_gets_samples_as_escaped_text(mlflow_run):
    expected = expected_html(mlflow_run.events)
    assert list(expected) == STEPS
    for step, text in expected.items():
        page = mlflow_run.read(f"samples/1/step_{step:08d}.html").decode()
        assert page == f'<!doctype html><meta charset="utf-8">{text}\n'
        assert text.startswith(f"<blockquote>{ESCAPED}</blockquote><p>")
        assert "<script" not in page
        assert "\x1b" not in page


def test_csv_beside_tensorboard_gets_scalars_and_is_named_once(tiny_backbone, tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    with caplog.at_level(logging.INFO, logger="gatera_lightning"):
        fit(tiny_backbone, tmp_path, [TensorBoardLogger(tmp_path), logger])
    told = [record for record in caplog.records if "CSVLogger" in record.getMessage()]
    assert [record.levelname for record in told] == ["INFO"]
    assert "CSVLogger gets the scalars of the gates, but no pictures" in told[0].getMessage()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["gates/response/mean"]]
    assert [int(row["step"]) for row in rows] == STEPS


def test_csv_alone_gets_scalars_and_one_warning_for_each_callback(tiny_backbone, tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    fit(tiny_backbone, tmp_path, [logger])
    warnings = [record.getMessage() for record in caplog.records if "CSVLogger" in record.getMessage()]
    assert len(warnings) == 3
    assert all("WandbLogger or MLFlowLogger, and the run has CSVLogger: " in text for text in warnings)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        assert any(row["gates/prompt/mean"] for row in csv.DictReader(file))
