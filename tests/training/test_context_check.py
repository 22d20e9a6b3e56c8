"""Examples that do not fit into the backbone's context are refused before its weights are loaded."""

import json
import shutil

import pytest
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning.errors import ConfigError
from gatera_lightning.training import module as training_module


@pytest.fixture
def backbone(tiny_backbone, tmp_path):
    """``backbone(50)`` is a copy of the tiny backbone with a context of 50 tokens; None for one without."""

    def build(context):
        folder = shutil.copytree(tiny_backbone, tmp_path / "backbone")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
        return folder

    return build


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""

    def fail(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(training_module, "load_adapted_model", fail)


def longest(data, split):
    return max(max(lengths) for lengths in data.tables[split]["lengths"])


@pytest.mark.parametrize(
    ("stage", "splits"),
    [("fit", ("train", "validation")), ("validate", ("validation",)), ("test", ("test",))],
)
@pytest.mark.parametrize("missing", [1, 20])
def test_examples_beyond_the_context_are_refused(
    stage, splits, missing, backbone, tiny_backbone, tmp_path, no_weights
):
    data = tiny_data(tiny_backbone)
    data.setup(stage)
    lengths = {split: longest(data, split) for split in splits}
    context = min(lengths.values()) - missing
    folder = backbone(context)
    run = getattr(tiny_trainer(tmp_path, limit_val_batches=1.0), stage)
    with pytest.raises(ConfigError) as caught:
        run(tiny_module(folder), datamodule=tiny_data(folder))
    assert len(caught.value.problems) == len(splits)
    for split, problem in zip(splits, caught.value.problems, strict=True):
        assert problem.startswith("data.max_length: 256, and example ")
        assert problem.endswith(
            f" of {split} has {lengths[split]} tokens, but the context of {folder} has {context}; "
            f"accepted: at most {context}"
        )


def test_examples_that_fill_the_context_are_accepted(backbone, tiny_backbone, tmp_path):
    data = tiny_data(tiny_backbone)
    data.setup("fit")
    folder = backbone(max(longest(data, split) for split in ("train", "validation")))
    tiny_trainer(tmp_path, max_steps=1).fit(tiny_module(folder), datamodule=tiny_data(folder))


@pytest.mark.parametrize("evaluate_by", [["generation"], ["likelihood", "generation"]])
def test_prompts_need_room_for_generated_answers(evaluate_by, backbone, tiny_backbone, tmp_path, no_weights):
    data = tiny_data(tiny_backbone)
    data.setup("test")
    prompt = max(map(len, data.tables["test"]["prompt"]))
    folder = backbone(prompt + 63)
    module = tiny_module(folder)
    module.decoding.max_new_tokens = 64
    with pytest.raises(ConfigError) as caught:
        tiny_trainer(tmp_path).test(module, datamodule=tiny_data(folder, evaluate_by=evaluate_by))
    assert str(caught.value).startswith("model.decoding.max_new_tokens: 64, after the prompt of example ")
    assert str(caught.value).endswith("accepted: at most 63, or a smaller data.max_length")


@pytest.mark.parametrize("context", [None, 10**6])
def test_backbone_without_limit_accepts_everything(context, backbone, tmp_path, monkeypatch):
    from gatera_lightning.training import context_check

    folder = backbone(512)
    monkeypatch.setattr(context_check, "context_length", lambda config: context)
    data = tiny_data(folder, evaluate_by=["generation"])
    data.setup("test")
    trainer = tiny_trainer(tmp_path)
    trainer.datamodule = data
    module = tiny_module(folder)
    context_check.check_context(trainer, "test", module.backbone, module.decoding)


def test_other_data_is_not_checked(tiny_backbone, tmp_path):
    from gatera_lightning.training.context_check import check_context

    module = tiny_module(tiny_backbone)
    check_context(tiny_trainer(tmp_path), "fit", module.backbone, module.decoding)
