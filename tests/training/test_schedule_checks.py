"""Validations and warm-ups are compared with the steps that the data gives."""

import pytest
from tiny_backbone import tiny_data, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM

from gatera_lightning import ConfigError
from gatera_lightning.datamodules.batching.batch_schedule import empty_share


def fit(folder, root, warmup_steps=0, data=None, **settings):
    trainer = tiny_trainer(root, **({"limit_val_batches": 1, "max_steps": 2} | settings))
    trainer.fit(tiny_module(folder, warmup_steps=warmup_steps), datamodule=tiny_data(folder, **(data or {})))


@pytest.mark.parametrize(
    ("interval", "settings", "data", "most"),
    [
        (7, {}, {}, 6),
        (13, {"accumulate_grad_batches": 2}, {}, 12),
        (3, {"limit_train_batches": 2}, {}, 2),
        (1000, {}, {"batch_size": 48}, 1),
    ],
)
def test_validation_beyond_the_epoch_is_refused_before_weights_are_loaded(
    tiny_backbone, tmp_path, monkeypatch, interval, settings, data, most
):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    with pytest.raises(ConfigError, match=f"val_check_interval: {interval}, but an epoch has {most} micro-"):
        fit(tiny_backbone, tmp_path, val_check_interval=interval, data=data, **settings)


@pytest.mark.parametrize(
    ("interval", "settings"),
    [(6, {}), (7, {"check_val_every_n_epoch": None}), (7, {"limit_val_batches": 0}), (1.0, {}), (0.1, {})],
)
def test_validation_that_comes_is_accepted(tiny_backbone, tmp_path, interval, settings):
    fit(tiny_backbone, tmp_path, val_check_interval=interval, **settings)


@pytest.mark.parametrize(
    ("warmup", "settings", "steps"),
    [
        (2, {"max_steps": 2}, 2),
        (1, {"max_steps": 2}, None),
        (6, {"max_steps": -1, "max_epochs": 1}, 6),
        (5, {"max_steps": -1, "max_epochs": 1}, None),
        (9, {"max_steps": 20, "max_epochs": 1}, 6),
    ],
)
def test_warm_up_beyond_the_run_is_named(tiny_backbone, tmp_path, caplog, warmup, settings, steps):
    fit(tiny_backbone, tmp_path, warmup_steps=warmup, **settings)
    named = f"model.optimizer.warmup_steps: {warmup}, but the run has {steps} steps" in caplog.text
    assert named == (steps is not None)
    assert ("warmup_steps" in caplog.text) == named


@pytest.mark.parametrize(
    ("stage", "name", "limit", "message"),
    [
        (
            "fit",
            "limit_train_batches",
            0.1,
            "0.1 of 6 batches is none; accepted: an integer",
        ),
        ("fit", "limit_train_batches", 0, "0; accepted: a number of batches of at least 1"),
        ("fit", "limit_val_batches", 0.1, "0.1 of 4 batches is none; accepted: .* share of at least 0.25"),
        ("validate", "limit_val_batches", 0.1, "0.1 of 4 batches is none"),
        ("test", "limit_test_batches", 0.01, "0.01 of 6 batches is none; .* at least 0.1667"),
        ("predict", "limit_predict_batches", 0.01, "0.01 of 6 batches is none"),
        ("fit", "max_time", "00:00:00:00", " .Timer.: 0 seconds; accepted: a time above 0"),
    ],
)
def test_nothing_to_do_is_refused_before_weights_are_loaded(
    tiny_backbone, tmp_path, monkeypatch, stage, name, limit, message
):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    trainer = tiny_trainer(tmp_path, **({"limit_val_batches": 1} | {name: limit}))
    data = tiny_data(tiny_backbone, eval_batch_size=2, evaluate_by=["likelihood"])
    run = getattr(trainer, stage)
    with pytest.raises(ConfigError, match=f"trainer.{name}:? ?{message}"):
        run(tiny_module(tiny_backbone), datamodule=data)


def test_smallest_accepted_share_leaves_a_batch():
    for available in range(1, 500):
        share = float(empty_share("limit_val_batches", 0.0, available).rpartition(" ")[2])
        assert int(available * share) >= 1
