"""Gate heatmaps: a picture of every probe text at the promised steps, drawn without touching the run."""

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


def test_a_picture_of_each_text_at_the_first_step_and_every_two(tiny_backbone, tmp_path):
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


def test_the_last_step_is_drawn_whatever_the_interval(tiny_backbone, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_backbone, tmp_path, logger, every_n_steps=3, texts=["What do bees make?"])
    assert [picture.step for picture in images(logger.log_dir)["gate_heatmap/1"]] == [1, 3, 4]


def test_a_second_run_with_the_same_callback_draws_its_own(tiny_backbone, tmp_path):
    callback = GateHeatmap(2, ["What do bees make?"])
    for name in ("one", "two"):
        logger = TensorBoardLogger(tmp_path, name)
        tiny_trainer(tmp_path, callback, logger=logger).fit(
            tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
        )
        assert [picture.step for picture in images(logger.log_dir)["gate_heatmap/1"]] == [1, 2, 4]


def test_a_step_is_drawn_once_whether_the_run_begins_or_goes_on(tiny_backbone, tmp_path):
    """With two micro-batches a step, the first one ends at the step that the run before has drawn."""
    settings = {"accumulate_grad_batches": 2, "limit_train_batches": 6}
    logger = TensorBoardLogger(tmp_path, "one")
    trainer = tiny_trainer(tmp_path, GateHeatmap(2), logger=logger, max_steps=2, **settings)
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone, batch_size=8))
    assert [picture.step for picture in images(logger.log_dir)["gate_heatmap/1"]] == [1, 2]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    logger = TensorBoardLogger(tmp_path, "two")
    trainer = tiny_trainer(tmp_path, GateHeatmap(2), logger=logger, max_steps=4, **settings)
    trainer.fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone), ckpt_path=tmp_path / "two.ckpt"
    )
    assert [picture.step for picture in images(logger.log_dir)["gate_heatmap/1"]] == [4]


def test_a_text_longer_than_the_context_is_left_out_and_said(tiny_backbone, tmp_path, caplog):
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_backbone, tmp_path, logger, every_n_steps=4, texts=["a b " * 300, "Why?"])
    assert "gate heatmaps: left out 'a b a b" in caplog.text
    assert "tokens of at most 512" in caplog.text
    assert list(images(logger.log_dir)) == ["gate_heatmap/1"]


def test_a_run_is_the_same_with_and_without_pictures(tiny_backbone, tmp_path):
    with_pictures = fit(tiny_backbone, tmp_path / "with", TensorBoardLogger(tmp_path), every_n_steps=1)
    without = fit(tiny_backbone, tmp_path / "without", False)
    for name, parameter in adapter_parameters(with_pictures.model).items():
        assert torch.equal(parameter, adapter_parameters(without.model)[name])


def test_other_loggers_go_without_and_are_told_once(tiny_backbone, tmp_path, caplog):
    fit(tiny_backbone, tmp_path, CSVLogger(tmp_path), every_n_steps=1)
    assert caplog.text.count("gate heatmaps need the TensorBoard logger") == 1


@pytest.mark.parametrize(
    "settings",
    [{"gate": "static", "every_n_steps": 1}, {"gate": "none", "every_n_steps": 1}, {"every_n_steps": 0}],
)
def test_without_token_gates_or_switched_off_nothing_is_drawn(tiny_backbone, tmp_path, settings):
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_backbone, tmp_path, logger, **settings)
    assert images(logger.log_dir) == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every_n_steps": -1}, r"gate_heatmap\.every_n_steps: -1; accepted: at least 1, or 0 for never"),
        ({"texts": ["a", " "]}, r"gate_heatmap\.texts: \['a', ' '\]; accepted: texts, none of them empty"),
    ],
)
def test_what_cannot_work_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        GateHeatmap(**settings)
