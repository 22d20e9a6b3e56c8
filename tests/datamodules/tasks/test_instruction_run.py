"""Runs on the user's own data: the shipped recipe, and a config with the old class name."""

import json
import shutil

import pytest
from jsonargparse import ArgumentParser
from tiny_backbone import tiny_args

from gatera_lightning import datamodules
from gatera_lightning.cli.main import main
from gatera_lightning.datamodules import InstructionDataModule, SupervisedDataModule

CHAT_TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}>\n{{ turn['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.fixture
def chat_backbone(tiny_backbone, tmp_path):
    """The tiny backbone with a chat template."""
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    return folder


@pytest.mark.slow
def test_recipe_trains_and_tests(chat_backbone, tmp_path, monkeypatch, capsys):
    """With the chat template, every response and packing."""
    monkeypatch.chdir(tmp_path)
    args = ["--config", "own_data.yaml", *tiny_args(chat_backbone), "--data.init_args.packing", "true"]
    for split, count in {"train": 48, "validation": 9, "test": 4}.items():
        args.append(f"--data.init_args.{split}=['calendar[:{count}]']")
    assert main(["fit", *args]) == 0
    (last,) = tmp_path.glob("runs/own_data/version_0/checkpoints/last")
    capsys.readouterr()
    args += ["--evaluation.folder", "results", "--model.warm_start", str(last)]
    assert main(["test", *args]) == 0
    lines = (tmp_path / "results" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert [(row["task"], row["example"], row["gold"]) for row in predictions] == [
        ("calendar", number, 0) for number in range(4)
    ]
    for row in predictions:
        assert row["likelihood"]["log_likelihoods"][0] < 0
        assert row["generation"]["reference"]
        assert "token_f1" in row["generation"]["scores"]
    printed = capsys.readouterr().out
    assert "nats per token" in printed
    assert "generated texts compared with their references" in printed
    assert "accuracy" not in printed


def test_class_path_with_old_name_is_resolved():
    parser = ArgumentParser()
    parser.add_subclass_arguments(SupervisedDataModule, "data")
    old_class_path = "gatera_lightning.datamodules.OwnDataModule"
    settings = {"columns": {"output": "answer"}, "template": "plain", "train_on": "response"}
    with pytest.warns(FutureWarning, match="OwnDataModule is now called InstructionDataModule"):
        config = parser.parse_object({"data": {"class_path": old_class_path, "init_args": settings}})
    data = parser.instantiate_classes(config).data
    assert type(data) is InstructionDataModule
    assert data.columns == {"output": "answer"}


def test_unknown_name_in_datamodules_is_rejected():
    with pytest.raises(AttributeError, match=r"gatera_lightning\.datamodules' has no attribute 'Own'"):
        datamodules.Own  # noqa: B018
