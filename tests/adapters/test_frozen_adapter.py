"""A trained adapter that is part of the frozen model: nothing sees it, and it computes as in decoding."""

import copy

import pytest
import torch

from gatera_lightning import (
    AdapterConfig,
    AdapterFileError,
    ConfigError,
    adapter_parameters,
    inject_adapters,
    load_adapter,
    position_mask,
    record_gates,
    save_adapter,
)
from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.adapters.frozen_adapter import adapter_digest, load_frozen_adapter
from gatera_lightning.adapters.identity import backbone_identity
from gatera_lightning.adapters.injection import remove_adapters
from gatera_lightning.adapters.loading import read_adapter
from gatera_lightning.adapters.lookup import adapted_linears, frozen_adapter

IDS = torch.arange(24).reshape(3, 8)
TUNED = AdapterConfig(rank=3, dropout=0.5, target_modules=["q_proj", "down_proj"])
DRAFT = AdapterConfig(update="lora", gate="position", rank=2, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def folder(tiny_llama, randomize, tmp_path):
    """The folder of a trained GateRA adapter."""
    model = tiny_llama()
    inject_adapters(model, TUNED)
    return save_adapter(randomize(model), tmp_path / "tuned")


@pytest.fixture
def tuned(tiny_llama, folder):
    """The model with this adapter, as decoding loads it."""
    model = tiny_llama()
    load_adapter(model, folder)
    return model.eval().requires_grad_(False)


@pytest.fixture
def frozen(tiny_llama, folder):
    """The model of which this adapter is a part."""
    model = tiny_llama()
    load_frozen_adapter(model, folder)
    return model.train()


def test_frozen_model_computes_what_decoding_computes(frozen, tuned):
    assert torch.equal(frozen(IDS).logits, tuned(IDS).logits)  # without dropout, although it is in training
    inject_adapters(frozen, DRAFT)
    with position_mask(frozen, torch.zeros(8, dtype=torch.bool)):
        assert torch.equal(frozen.train()(IDS).logits, tuned(IDS).logits)


def test_only_the_adapter_over_it_is_seen(frozen, tuned, tiny_llama, tmp_path):
    assert not adapted_linears(frozen)
    with pytest.raises(ConfigError, match="a trained adapter is part of this frozen model"):
        frozen.save_pretrained(tmp_path / "draft")
    config, digest = frozen_adapter(frozen)
    assert config == TUNED
    assert digest == adapter_digest(tuned, TUNED)
    report = inject_adapters(frozen, DRAFT)
    plain = copy.deepcopy(tiny_llama())
    expected = inject_adapters(plain, DRAFT)
    assert report.layers == expected.layers
    assert report.matches == expected.matches
    assert report.trainable == expected.trainable
    assert report.frozen - expected.frozen == sum(p.numel() for p in adapter_parameters(tuned).values())
    assert adapter_parameters(frozen).keys() == adapter_parameters(plain).keys()
    assert {n for n, p in frozen.named_parameters() if p.requires_grad} == set(adapter_parameters(frozen))
    assert backbone_identity(frozen) == backbone_identity(plain)
    with (
        torch.no_grad(),
        position_mask(frozen, torch.ones(8, dtype=torch.bool)),
        record_gates(frozen) as gates,
    ):
        frozen(IDS)
    assert gates.names == list(report.layers)
    stored, tensors = read_adapter(save_adapter(frozen, tmp_path / "draft"))
    assert tensors.keys() == adapter_parameters(plain).keys()
    assert stored.origin["adapter_sha256"] == digest
    assert digest in (tmp_path / "draft" / "README.md").read_text(encoding="utf-8")
    load_adapter(plain, tmp_path / "draft")  # the same backbone
    remove_adapters(frozen)
    assert torch.equal(frozen(IDS).logits, tuned(IDS).logits)


def test_digest_depends_on_values_and_settings(tuned):
    digests = {adapter_digest(tuned, TUNED)}
    digests.add(adapter_digest(tuned, AdapterConfig(rank=3, target_modules=["q_proj", "down_proj"])))
    with torch.no_grad():
        next(iter(adapter_parameters(tuned).values()))[0, 0] += 1e-3
    digests.add(adapter_digest(tuned, TUNED))
    assert len(digests) == 3


def test_draft_rows_in_training_are_those_of_decoding(frozen, tuned, randomize, tmp_path):
    inject_adapters(frozen, DRAFT)
    save_adapter(randomize(frozen), tmp_path / "draft")
    draft = load_draft_adapter(tuned, tmp_path / "draft")
    with torch.no_grad():
        with draft.on_last(3, (3, 8)):
            decoded = tuned(IDS).logits
        with position_mask(frozen, torch.arange(8) >= 5):
            trained = frozen(IDS).logits
    assert torch.equal(trained[:, :5], decoded[:, :5])
    torch.testing.assert_close(trained, decoded, atol=1e-4, rtol=1e-4)
    assert (decoded - tuned(IDS).logits)[:, 5:].abs().max() > 1e-2


def test_draft_adapter_for_another_model_is_loaded_with_a_note(
    tiny_llama, frozen, tuned, randomize, tmp_path, caplog
):
    caplog.set_level("INFO", "gatera_lightning")
    inject_adapters(frozen, DRAFT)
    save_adapter(frozen, tmp_path / "draft")
    load_draft_adapter(tuned, tmp_path / "draft")
    assert not caplog.messages
    plain = tiny_llama()
    load_draft_adapter(plain, tmp_path / "draft")
    load_draft_adapter(randomize(tuned), tmp_path / "draft")
    inject_adapters(plain, DRAFT)
    save_adapter(plain, tmp_path / "of_plain")
    load_draft_adapter(tuned, tmp_path / "of_plain")
    notes = [text.partition("to draft for ")[2].partition(";")[0] for text in caplog.messages]
    kind = f"the backbone with adapter SHA-256 {frozen_adapter(frozen)[1][:16]}, and this model has"
    assert notes[0] == f"{kind} no adapter"
    assert notes[1].startswith(f"{kind} adapter SHA-256 ")
    assert notes[2].startswith("the backbone alone, and this model has adapter SHA-256 ")


def test_adapter_of_another_backbone_is_refused(tiny_llama, folder):
    model = tiny_llama(seed=1)
    with pytest.raises(AdapterFileError, match="was trained on another backbone"):
        load_frozen_adapter(model, folder)
    assert not [name for name, _ in model.named_parameters() if ".base." in name]
