"""Tests of TensorBoardOverview, read with TensorBoard's own code: Custom Scalars and HParams."""

import json
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler as ListSessionGroups
from tiny_backbone import NO_PICTURES, sample_rows, tiny_args, tiny_data, tiny_module, tiny_trainer

from gatera_lightning.adapters.gates import PositionGateConfig, TokenGateConfig
from gatera_lightning.callbacks.gate_histogram import GateHistogram
from gatera_lightning.callbacks.tensorboard_overview import TensorBoardOverview
from gatera_lightning.cli.main import main
from gatera_lightning.objectives import MaskEmbeddings, SelfDraft

LAYOUT = "custom_scalars__config__"
STATUSES = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]


def fit(backbone, root, logger, data=None, **adapter):
    """Train for four steps, with a validation after every second one."""
    trainer = tiny_trainer(
        root,
        TensorBoardOverview(),
        GateHistogram(2),
        logger=logger,
        limit_val_batches=1,
        val_check_interval=2,
    )
    trainer.fit(tiny_module(backbone, **adapter), datamodule=data or tiny_data(backbone))
    return trainer


def hparams_tab(folder):
    """``(names of settings, names of results, {run: (settings, results, status)})`` as the tab shows them."""
    multiplexer = EventMultiplexer(tensor_size_guidance={"scalars": 0})
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    context = Context(SimpleNamespace(data_provider=MultiplexerDataProvider(multiplexer, str(folder))))
    read = (
        context.hparams_metadata(RequestContext(), ""),
        context.hparams_from_data_provider(RequestContext(), "", limit=None),
    )
    experiment = context.experiment_from_metadata(RequestContext(), "", True, *read)
    columns = [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=STATUSES, col_params=columns, slice_size=100, include_metrics=True
    )
    found = ListSessionGroups(RequestContext(), context, "", request).run()
    sessions = {}
    for group in found.session_groups:
        (session,) = group.sessions
        values = {
            name: value.WhichOneof("kind") and getattr(value, value.WhichOneof("kind"))
            for name, value in group.hparams.items()
        }
        results = {value.name.tag: value.value for value in session.metric_values}
        sessions[session.name] = (values, results, session.status)
    names = [info.name for info in experiment.hparam_infos]
    return names, [info.name.tag for info in experiment.metric_infos], sessions


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def layout_of(folder):
    """``{section: {chart: tags}}`` of the only layout."""
    (event,) = events(folder).Tensors(LAYOUT)
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    return {
        part.title: {chart.title: list(chart.multiline.tag) for chart in part.chart}
        for part in layout.category
    }


@pytest.mark.parametrize(
    ("gate", "parts"),
    [
        ("token", ["loss", "gates", "optimizer", "speed"]),
        ("hard", ["loss", "gates", "skipped tokens", "optimizer", "speed"]),
        ("none", ["loss", "optimizer", "speed"]),
        ("position", ["drafts", "optimizer", "speed"]),
    ],
)
def test_charts_show_logged_tags(tiny_backbone, tmp_path, gate, parts):
    logger = TensorBoardLogger(tmp_path, name="run")
    drafts = {"objectives": [SelfDraft([2])]} if gate == "position" else {}
    fit(tiny_backbone, tmp_path, logger, gate=gate, **drafts)
    layout, logged = layout_of(logger.log_dir), events(logger.log_dir).Tags()["scalars"]
    assert list(layout) == parts
    for part in ("loss", "gates", "drafts", "skipped tokens"):
        for chart, tags in layout.get(part, {}).items():
            for tag in tags:
                assert any(re.match(tag, name) for name in logged), f"{chart}: {tag}"
    if gate == "token":
        shown = [name for name in logged if re.match(layout["gates"]["mean"][1], name)]
        assert sorted(shown) == ["gates/prompt/mean", "gates/response/mean"]


def test_drafts_of_several_tasks_have_charts(tiny_backbone, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps(sample_rows("validation")[:3]))
    data = tiny_data(tiny_backbone, validation=["everyday[:2]", str(tmp_path / "other.json")])
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tiny_backbone, tmp_path, logger, data=data, gate="position", objectives=[SelfDraft([2])])
    logged = events(logger.log_dir).Tags()["scalars"]
    charts = layout_of(logger.log_dir)["drafts by task"]
    for name, (tag,) in zip(("acceptance_1", "tokens_per_cycle"), charts.values(), strict=True):
        shown = [found for found in logged if re.match(tag, found)]
        assert sorted(shown) == [f"val/{name}/everyday", f"val/{name}/other"]


def test_losses_of_mask_embeddings_have_charts(tiny_backbone, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    objectives = [SelfDraft([2], form=MaskEmbeddings())]
    gate = PositionGateConfig(mask_embeddings=2)
    fit(tiny_backbone, tmp_path, logger, gate=gate, objectives=objectives)
    layout, logged = layout_of(logger.log_dir), events(logger.log_dir).Tags()["scalars"]
    assert list(layout) == ["drafts", "losses of mask embeddings", "optimizer", "speed"]
    tags = [tag for tags in layout["losses of mask embeddings"].values() for tag in tags]
    assert len(tags) == 3
    assert all(any(re.match(tag, name) for name in logged) for tag in tags)


def test_table_has_settings_and_results(tiny_backbone, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer = fit(tiny_backbone, tmp_path, logger, gate=TokenGateConfig(bias=-1.5), rank=2)
    trainer.test(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)
    names, results, sessions = hparams_tab(tmp_path)
    assert {"train/task_loss", "val/loss", "test/loss"} <= set(results)
    ((settings, found, status),) = sessions.values()
    assert settings == {
        "backbone": str(tiny_backbone),
        "update": "hira",
        "gate": "token",
        "rank": 2,
        "dropout": 0,
        "target_modules": "q_proj, k_proj, v_proj, up_proj, down_proj",
        "gate_bias": -1.5,
        "gate_entropy_weight": 0.01,
        "lr": 0.01,
        "gate_lr_multiplier": 1,
        "schedule": "linear",
        "warmup_steps": 0,
        "weight_decay": 0,
        "max_steps": 4,
        "template": "plain",
        "train_on": "response",
        "data": "everyday[:48]",
        "batch_size": 8,
        "seed": 0,
    }
    assert set(settings) <= set(names)
    scalars = events(logger.log_dir)
    assert {"train/task_loss", "val/loss", "test/loss", "test/accuracy_sum"} <= set(found)
    assert found == {name: scalars.Scalars(name)[-1].value for name in found}
    assert status == api_pb2.STATUS_SUCCESS
    assert "hp_metric" not in scalars.Tags()["scalars"]


def test_table_has_settings_of_test_without_training(tiny_backbone, tmp_path):
    trainer = tiny_trainer(tmp_path, TensorBoardOverview(), logger=TensorBoardLogger(tmp_path, name="run"))
    trainer.test(tiny_module(tiny_backbone, layers=[1]), datamodule=tiny_data(tiny_backbone), verbose=False)
    _, _, sessions = hparams_tab(tmp_path)
    ((settings, found, status),) = sessions.values()
    assert (settings["update"], settings["layers"]) == ("hira", "1")
    assert {"test/loss", "test/accuracy_sum"} <= set(found)
    assert status == api_pb2.STATUS_SUCCESS


def test_table_columns_do_not_depend_on_method(tiny_backbone, tmp_path):
    """TensorBoard takes the columns from one run; settings of other methods must not be lost."""
    alone = []
    for name, method in (("a", {"update": "lora", "gate": "none", "alpha": 8.0}), ("b", {})):
        fit(tiny_backbone, tmp_path, TensorBoardLogger(tmp_path / name, name=name), **method)
        alone.append(hparams_tab(tmp_path / name)[:2])
    assert alone[0] == alone[1]
    _, _, sessions = hparams_tab(tmp_path)
    lora, gatera = (sessions[name][0] for name in sorted(sessions))
    assert (lora["alpha"], gatera["gate_bias"]) == (8, 0)
    assert not {"gate_bias", "gate_entropy_weight", "gate_lr_multiplier"} & set(lora)
    assert "alpha" not in gatera


class Interrupt(TensorBoardOverview):
    """Saves a checkpoint and fails after the second step."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/two.ckpt")
            raise RuntimeError("out of memory")


@pytest.fixture
def failed(tiny_backbone, tmp_path):
    """The log folder of a run that failed."""
    trainer = tiny_trainer(
        tmp_path,
        Interrupt(),
        logger=TensorBoardLogger(tmp_path, name="run", version="job"),
        log_every_n_steps=1,
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    return tmp_path / "run" / "job"


def test_failed_run_has_settings_and_results(failed):
    _, _, sessions = hparams_tab(failed.parent)
    ((settings, found, status),) = sessions.values()
    assert settings["update"] == "hira"
    assert found == {"train/task_loss": events(failed).Scalars("train/task_loss")[-1].value}
    assert status == api_pb2.STATUS_UNKNOWN


@pytest.mark.parametrize("version", ["job", "other"])
def test_resumed_run_writes_overview_once_per_folder(tiny_backbone, tmp_path, failed, version):
    checkpoint = tmp_path / "two.ckpt"
    trainer = tiny_trainer(
        tmp_path, Interrupt(), logger=TensorBoardLogger(tmp_path, name="run", version=version)
    )
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone), ckpt_path=checkpoint)
    for folder in {"job", version}:
        assert list(layout_of(tmp_path / "run" / folder)) == ["loss", "gates", "optimizer", "speed"]
    _, _, sessions = hparams_tab(tmp_path / "run")
    statuses = {name: status for name, (_, _, status) in sessions.items()}
    assert statuses == {"job": api_pb2.STATUS_UNKNOWN} | {version: api_pb2.STATUS_SUCCESS}


def test_command_line_run_has_overview_without_hp_metric(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), *NO_PICTURES]) == 0
    _, _, sessions = hparams_tab("runs")
    ((settings, found, _),) = sessions.values()
    assert (settings["rank"], settings["data"]) == (4, "everyday[:48]")
    assert set(found) == {"train/task_loss", "val/loss"}
    folder = "runs/quickstart/version_0"
    assert LAYOUT in events(folder).Tags()["tensors"]
    assert "hp_metric" not in events(folder).Tags()["scalars"]


@pytest.mark.parametrize("kind", [CSVLogger, None], ids=["CSV", "no logger"])
def test_nothing_is_written_without_tensorboard(tiny_backbone, tmp_path, caplog, kind):
    trainer = tiny_trainer(tmp_path, TensorBoardOverview(), logger=kind(tmp_path) if kind else False)
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    assert not list(tmp_path.rglob("*tfevents*"))
    assert not [record for record in caplog.records if record.name.startswith("gatera_lightning.callbacks")]
