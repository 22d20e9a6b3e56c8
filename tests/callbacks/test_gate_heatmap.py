"""Tests of GateHeatmap: when heatmaps are drawn, and that training does not change."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning import adapter_parameters
from gatera_lightning.callbacks.gate_heatmap import GateHeatmap


def fit(backbone, root, logger, gate="token", **settings):
    module = tiny_module(backbone, gate=gate)
    callbacks = [GateHeatmap(**settings)] if settings else []
    trainer = tiny_trainer(root, *callbacks, logger=logger)
    trainer.fit(module, datamodule=tiny_data(backbone))
    return module


def images(folder):
    events = EventAccumulator(folder, size_guidance={"images": 0})
    events.Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


def test_heatmaps_are_drawn_at_first_step_and_interval(tiny_backbone, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_backbone, tmp_path, logger, every_n_steps=2, texts=["What do bees make?", "$5 and $6"])
    found = images(logger.log_dir)
    assert {tag: [picture.step for picture in pictures] for tag, pictures in found.items()} == {
        "gate_heatmap/1": [1, 2, 4],
        "gate_heatmap/2": [1, 2, 4],
    }
    first, *_, last = found["gate_heatmap/1"]
    assert first.width > 100
    assert first.encoded_image_string != last.encoded_image_string


def test_heatmap_is_drawn_at_last_step(tiny_backbone, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_backbone, tmp_path, logger, every_n_steps=3, texts=["What do bees make?"])
    assert [picture.step for picture in images(logger.log_dir)["gate_heatmap/1"]] == [1, 3, 4]


def test_callback_can_be_used_for_second_run(tiny_backbone, tmp_path):
    callback = GateHeatmap(2, ["What do bees make?"])
    for name in ("one", "two"):
        logger = TensorBoardLogger(tmp_path, name)
        tiny_trainer(tmp_path, callback, logger=logger).fit(
            tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
        )
        assert [picture.step for picture in images(logger.log_dir)["gate_heatmap/1"]] == [1, 2, 4]


def test_each_step_is_drawn_once_also_after_resuming(tiny_backbone, tmp_path):
    """With two micro-batches per step, the first one ends at the step that the earlier run has drawn."""
    settings = {"accumulate_grad_batches": 2, "limit_train_batches": 6}
    logger = TensorBoardLogger(tmp_path, "one")
    trainer = tiny_trainer(tmp_path, GateHeatmap(2, ["Why?"]), logger=logger, max_steps=2, **settings)
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone, batch_size=8))
    assert [picture.step for picture in images(logger.log_dir)["gate_heatmap/1"]] == [1, 2]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    logger = TensorBoardLogger(tmp_path, "two")
    trainer = tiny_trainer(tmp_path, GateHeatmap(2, ["Why?"]), logger=logger, max_steps=4, **settings)
    trainer.fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone), ckpt_path=tmp_path / "two.ckpt"
    )
    assert [picture.step for picture in images(logger.log_dir)["gate_heatmap/1"]] == [4]


def test_text_longer_than_context_is_skipped_with_warning(tiny_backbone, tmp_path, caplog):
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_backbone, tmp_path, logger, every_n_steps=4, texts=["a b " * 300, "Why?"])
    assert "gate heatmaps: skipped the text 'a b a b" in caplog.text
    assert "tokens, but the model accepts at most 512" in caplog.text
    assert list(images(logger.log_dir)) == ["gate_heatmap/1"]


def test_heatmaps_do_not_change_training(tiny_backbone, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    with_pictures = fit(tiny_backbone, tmp_path / "with", logger, every_n_steps=1, texts=["Why?"])
    without = fit(tiny_backbone, tmp_path / "without", False)
    for name, parameter in adapter_parameters(with_pictures.model).items():
        assert torch.equal(parameter, adapter_parameters(without.model)[name])


def test_other_loggers_cause_one_warning(tiny_backbone, tmp_path, caplog):
    fit(tiny_backbone, tmp_path, CSVLogger(tmp_path), every_n_steps=1)
    assert caplog.text.count("gate heatmaps need the TensorBoard logger") == 1


@pytest.mark.parametrize(
    "settings",
    [{"gate": "static", "every_n_steps": 1}, {"gate": "none", "every_n_steps": 1}, {"every_n_steps": 0}],
)
def test_nothing_is_drawn_without_token_gates_or_turned_off(tiny_backbone, tmp_path, settings):
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_backbone, tmp_path, logger, **settings)
    assert images(logger.log_dir) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": -1}, r"gate_heatmap\.every_n_steps: -1; accepted: at least 1, or 0 for never"),
        ({"texts": ["a", " "]}, r"gate_heatmap\.texts: \['a', ' '\]; accepted: texts, none of them empty"),
    ],
)
def test_invalid_arguments_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        GateHeatmap(**settings)
