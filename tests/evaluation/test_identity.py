"""An evaluation folder accepts only predictions of one evaluation; others are refused before computing."""

import json
import shutil

import pytest
import torch
from evaluations import EXAMPLES, evaluate, merged_bytes, perturbed_module
from safetensors.torch import load_file, save_file

from gatera_lightning import ConfigError, adapter_parameters
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.callbacks.evaluation_record import evaluation_identity
from gatera_lightning.datamodules import MathDataModule
from gatera_lightning.evaluation.identity import FORMAT_VERSION, IDENTITY_FILE
from gatera_lightning.evaluation.prediction_files import PREDICTIONS_FILE
from gatera_lightning.generation import DecodingConfig


@pytest.fixture(scope="module")
def module(tiny_backbone):
    return perturbed_module(tiny_backbone)


@pytest.fixture(scope="module")
def completed(module, tmp_path_factory):
    """The folder of a completed evaluation."""
    folder = tmp_path_factory.mktemp("completed")
    evaluate(module, folder)
    return folder


def with_slightly_other_adapter(folder):
    module = perturbed_module(folder)
    with torch.no_grad():
        next(iter(adapter_parameters(module.model).values()))[0, 0] += 1e-6
    return module


def on_other_backbone(folder, path):
    """The same module, but for one matrix of its backbone."""
    other = shutil.copytree(folder, path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return perturbed_module(other)


@pytest.mark.parametrize("state", ["complete", "killed"])
@pytest.mark.parametrize("differs", ["adapter", "backbone", "data", "dtype", "decoding"])
def test_evaluation_rejects_folder_of_other_evaluation(completed, tiny_backbone, tmp_path, differs, state):
    folder = shutil.copytree(completed, tmp_path / "folder")
    if state == "killed":
        (folder / PREDICTIONS_FILE).unlink()
        part = '[["generation", 0, {"text": "", "answer": null, "choice": null}]]\n'
        (folder / "part-0-0.jsonl").write_text(part)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    module = perturbed_module(tiny_backbone)
    if differs == "adapter":
        module = with_slightly_other_adapter(tiny_backbone)
    elif differs == "backbone":
        module = on_other_backbone(tiny_backbone, tmp_path)
    elif differs == "dtype":
        module.model.get_input_embeddings().double()
    elif differs == "decoding":
        module.decoding = DecodingConfig(max_new_tokens=5)
    with pytest.raises(ConfigError) as caught:  # a batch would raise Killed
        evaluate(module, folder, after=0, examples=6 if differs == "data" else EXAMPLES)
    assert f"{differs} was " in str(caught.value)
    assert str(caught.value).count(" was ") == 1  # nothing else differs
    assert "Choose another evaluation.folder" in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("other", [{"alpha": 8.0}, {"update": "hira"}], ids=str)
def test_evaluation_rejects_folder_of_other_method(tiny_backbone, tmp_path, other):
    """LoRA's scale is in no tensor, and the tensors of HiRA and LoRA have the same names."""
    lora = {"gate": "none", "update": "lora"}
    settings = {"evaluate_by": ["likelihood"], "examples": 2}
    evaluate(perturbed_module(tiny_backbone, **lora), tmp_path, **settings)
    with pytest.raises(ConfigError, match="method was"):
        evaluate(perturbed_module(tiny_backbone, **(lora | other)), tmp_path, after=0, **settings)


def test_evaluation_rejects_folder_without_identity(completed, module, tmp_path):
    folder = shutil.copytree(completed, tmp_path / "folder")
    (folder / IDENTITY_FILE).unlink()
    with pytest.raises(ConfigError, match=r"holds predictions, but no evaluation\.json"):
        evaluate(module, folder, after=0)
    assert merged_bytes(folder) == merged_bytes(completed)


def test_evaluation_rejects_folder_of_older_format(completed, module, tmp_path):
    """In format 1, every generated text was right or wrong."""
    folder = shutil.copytree(completed, tmp_path / "folder")
    identity = json.loads((folder / IDENTITY_FILE).read_text())
    assert identity["format"] == FORMAT_VERSION >= 2
    (folder / IDENTITY_FILE).write_text(json.dumps(identity | {"format": 1}))
    with pytest.raises(ConfigError, match=f"format was 1 and is {FORMAT_VERSION}"):
        evaluate(module, folder, after=0)
    assert merged_bytes(folder) == merged_bytes(completed)


def test_identity_names_the_rule_that_judges_generated_numbers(module):
    """Predictions that were judged by another rule are not reused."""
    rules = {}
    for kind, evaluate_by in (("generation", ["generation"]), ("likelihood", ["likelihood"])):
        data = MathDataModule(
            template="plain", train_on="response", answer_style="gsm8k", evaluate_by=evaluate_by
        )
        data.connect(load_tokenizer(module.backbone))
        data.setup("test")
        rules[kind] = evaluation_identity(module, data).get("answer_rule")
    assert rules == {"generation": "numbers within 0.001", "likelihood": None}
