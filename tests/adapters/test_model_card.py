"""The model card says what is known, as valid front matter and Markdown, and replaces nobody's own card."""

import pytest
import yaml

from gatera_lightning import AdapterConfig, inject_adapters, save_adapter
from gatera_lightning.adapters.model_card import model_card


def _front_matter(text):
    return yaml.safe_load(text.split("---")[1])


@pytest.fixture
def model(tiny_llama):
    found = tiny_llama()
    inject_adapters(found, AdapterConfig(rank=3, target_modules=["q_proj"]))
    return found


def test_card_names_backbone_method_data_and_metrics(model, tmp_path):
    details = {"Training data": {"train": ["boolq", "piqa"]}, "Metrics": {"val/loss": 1.25, "missing": None}}
    folder = save_adapter(
        model, tmp_path / "mine", backbone="meta-llama/Llama-3.2-1B", template="plain", details=details
    )
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert _front_matter(text) == {
        "base_model": "meta-llama/Llama-3.2-1B",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["gatera", "hira", "lightning", "base_model:adapter:meta-llama/Llama-3.2-1B"],
    }
    for line in (
        "# mine",
        "| base model | meta-llama/Llama-3.2-1B |",
        "| update u(x) | hira: (W0 ⊙ B A) x |",
        r"| gate entropy\_weight | 0.01 |",
        "| rank | 3 |",
        "| prompt template | plain |",
        "| train | boolq, piqa |",
        "| val/loss | 1.25 |",
        'model = AutoPeftModelForCausalLM.from_pretrained("mine")',
    ):
        assert line in text.splitlines()
    assert "missing" not in text


@pytest.mark.parametrize("backbone", ["/home/me/model", "model", None, "a/b/c", "package:llm"])
def test_only_a_hub_id_is_named_in_the_front_matter(backbone):
    text = model_card("mine", AdapterConfig(), {"id": backbone, "revision": None}, None)
    assert "base_model" not in _front_matter(text)


def test_values_cannot_break_the_table():
    origin = {"id": "x | y\n# <b>[z](javascript:1)", "revision": None}
    text = model_card("mine", AdapterConfig(), origin, None)
    assert r"| base model | x \| y # \<b\>\[z\](javascript:1) |" in text.splitlines()


def test_card_is_renewed_unless_somebody_wrote_it(model, tmp_path):
    folder = save_adapter(model, tmp_path)
    save_adapter(model, folder, details={"Metrics": {"val/loss": 2.5}})
    assert "| val/loss | 2.5 |" in (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text("My adapter")
    save_adapter(model, folder)
    assert (folder / "README.md").read_text() == "My adapter"
