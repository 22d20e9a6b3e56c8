"""Models for ``chat`` and ``generate``."""

import shutil

import pytest
from gate_reports import save_random_adapter
from terminal_models import GreedyReference, talkative_backbone
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def talkative(tiny_backbone, tmp_path_factory):
    """The folder of a backbone with a chat template that generates varied ASCII and does not end."""
    return talkative_backbone(tiny_backbone, tmp_path_factory.mktemp("talkative") / "backbone")


@pytest.fixture(scope="session")
def adapter(talkative, tmp_path_factory):
    """The folder of an adapter with token gates."""
    folder = tmp_path_factory.mktemp("random") / "adapter"
    save_random_adapter(folder, talkative)
    return str(folder)


@pytest.fixture(scope="session")
def reference(talkative, adapter):
    """Plain greedy decoding with that adapter."""
    return GreedyReference(talkative, adapter)


@pytest.fixture
def refusing(talkative, tmp_path):
    """``refusing(condition)``: a backbone whose chat template raises if a condition on ``messages`` holds."""

    def with_template(condition):
        folder = shutil.copytree(talkative, tmp_path / "refusing")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        refusal = "{% if " + condition + " %}{{ raise_exception('one turn only') }}{% endif %}"
        tokenizer.chat_template = refusal + tokenizer.chat_template
        tokenizer.save_pretrained(folder)
        return str(folder)

    return with_template
