"""What ``adapter_config.json`` may say, in today's schema and in the older one, and what is rejected."""

import json
import os
from pathlib import Path

import pytest
import torch
from old_formats import as_format_3

from gatera_lightning import AdapterConfig, AdapterFileError, inject_adapters, load_adapter, save_adapter
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.adapters.identity import backbone_identity
from gatera_lightning.adapters.stored_config import read_stored_config

TARGETS = ["q_proj", "down_proj"]


def _adapted(backbone, update="hira", gate="token", **settings):
    config = AdapterConfig(
        **({"update": update, "gate": gate, "rank": 3, "target_modules": TARGETS} | settings)
    )
    inject_adapters(backbone, config, torch.Generator().manual_seed(0))
    return backbone


def _edit(folder, change):
    path = folder / "adapter_config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    change(description)
    path.write_text(json.dumps(description), encoding="utf-8")


def _refusal(folder):
    with pytest.raises(AdapterFileError) as caught:
        read_stored_config(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tiny_llama, randomize, tmp_path):
    """Save a GateRA adapter of the tiny Llama."""
    return save_adapter(randomize(_adapted(tiny_llama())), tmp_path / "adapter")


@pytest.fixture
def old(folder):
    """Return the same folder in format 3."""
    return as_format_3(folder)


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/checkpoints/step=3.ckpt"])
def test_folder_around_an_adapter_names_it(tiny_llama, tmp_path, given):
    for name in ("step=3", "last"):
        save_adapter(_adapted(tiny_llama()), tmp_path / "run" / "checkpoints" / name)
    named = "step=3" if given.endswith(".ckpt") else "last"
    message = _refusal(tmp_path / given)
    assert message.endswith(f"; did you mean '{tmp_path / 'run' / 'checkpoints' / named}'?")


def test_folder_of_runs_names_the_newest_one(tiny_llama, tmp_path):
    last = [tmp_path / f"version_{number}" / "checkpoints" / "last" for number in (0, 1)]
    for seconds, folder in enumerate(last):
        save_adapter(_adapted(tiny_llama()), folder)
        os.utime(folder / "adapter_config.json", (seconds, seconds))
    assert _refusal(tmp_path).endswith(f"; did you mean '{last[1]}'?")


def test_working_folder_without_adapter_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _refusal(Path()) == ".: not an adapter folder (adapter_config.json is missing)"


def test_folder_without_adapter_suggests_none(tmp_path):
    assert _refusal(tmp_path).endswith("(adapter_config.json is missing)")


@pytest.mark.parametrize(
    "pattern", [".*" * 501, [".*" * 501], ["q_proj", "a" * 1_001]], ids=["text", "one", "several"]
)
def test_long_pattern_is_refused(folder, pattern):
    _edit(folder, lambda description: description.update(target_modules=pattern))
    assert "characters; at most 1,000 are accepted" in _refusal(folder)


# --- today's schema, which is PEFT's ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rr": 3}, "unknown keys rr; accepted: .*did you mean 'r'"),
        ({"use_dora": True}, "unknown keys use_dora"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: 5; accepted: a text or null"),
        ({"revision": ["main"]}, r"revision: \['main'\]; accepted: a text or null"),
        ({"peft_type": "VERA"}, "peft_type: 'VERA'; accepted: GATERA, LORA, HIRA"),
        ({"peft_type": None}, "peft_type: None; accepted: GATERA"),
        ({"inference_mode": 1}, "inference_mode: 1; accepted: true or false"),
        ({"gatera": 3}, "gatera: 3; accepted: a table"),
        ({"r": "3"}, "rank: '3' is not a rank"),
        ({"r": None}, "rank: None is not a rank"),
        ({"r": 2.5}, "rank: 2.5 is not a rank"),
        ({"r": True}, "rank: True is not a rank"),
        ({"target_modules": 7}, "target_modules: 7"),
        ({"target_modules": [7]}, "target_modules: 7 is not a string"),
        ({"layers_to_transform": "all"}, "layers: 'all'"),
        ({"update": "vera"}, "update: 'vera' is unknown"),
        ({"update": ["hira"]}, r"update: \['hira'\] is unknown"),
        ({"gate": "soft"}, "gate: 'soft' is unknown"),
        ({"gate": {"kind": "soft"}}, "gate.kind: 'soft' is unknown"),
        ({"gate": {"kind": "token", "bias": "high"}}, "gate.bias: 'high'"),
        ({"gate": 3}, "gate: 3 is unknown"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\] needs PEFT"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices: \[3\] needs PEFT"),
    ],
    ids=str,
)
def test_bad_key_is_named(folder, change, message):
    _edit(folder, lambda description: description.update(change))
    with pytest.raises(AdapterFileError, match=message):
        read_stored_config(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": True}, "gatera.format_version True; this version reads 1 to 4"),
        ({"format_version": 4.0}, "gatera.format_version 4.0; this version reads 1 to 4"),
        ({"format_version": 5}, "gatera.format_version 5; this version reads 1 to 4"),
        ({"fingerprint": 3}, "gatera.fingerprint: 3; accepted: a text or null"),
        ({"weights_sha256": None}, "gatera.weights_sha256: None; accepted: a text"),
        (
            {"weight_sha256": "a"},
            "gatera.weight_sha256 is unknown; .*mean 'weights_sha256'",
        ),
        ({"template": "plane"}, "template: 'plane' is unknown; accepted: alpaca, plain, chat"),
        ({"template": None}, "gatera.template: None; accepted: a text"),
        ({"template": 3}, "gatera.template: 3; accepted: a text"),
    ],
    ids=str,
)
def test_bad_record_is_named(folder, change, message):
    _edit(folder, lambda description: description["gatera"].update(change))
    with pytest.raises(AdapterFileError, match=message):
        read_stored_config(folder)


@pytest.mark.parametrize("key", ["update", "gate", "r", "target_modules"])
def test_missing_setting_is_named(folder, key):
    _edit(folder, lambda description: description.pop(key))
    assert f"malformed: {key} is missing" in _refusal(folder)


@pytest.mark.parametrize("key", ["weights_sha256", "settings_sha256"])
def test_missing_digest_is_named(folder, key):
    _edit(folder, lambda description: description["gatera"].pop(key))
    assert f"malformed: gatera.{key} is missing" in _refusal(folder)


@pytest.mark.parametrize(
    ("targets", "layers", "stored"),
    [
        (["q_proj", "down_proj"], None, ["q_proj", "down_proj"]),
        (["q_proj"], [1], ["q_proj"]),
        ([".*(q|k)_proj"], None, ".*(q|k)_proj"),
        (["v_proj", ".*(q|k)_proj"], None, r"(?:(?:.*\.)?v_proj)|(?:.*(q|k)_proj)"),
        ([".*q_proj"], [1], ["model.layers.1.self_attn.q_proj"]),
    ],
)
def test_choice_of_layers_survives_peft_schema(tiny_llama, tmp_path, targets, layers, stored):
    model = _adapted(tiny_llama(), target_modules=targets, layers=layers)
    save_adapter(model, tmp_path)
    description = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert description["target_modules"] == stored
    load_adapter(tiny_llama(), tmp_path)
    load_adapter(model, tmp_path)
    save_adapter(model, tmp_path / "again")
    again = tiny_llama()
    load_adapter(again, tmp_path)
    save_adapter(again, tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_bytes() == (
        tmp_path / "adapter_config.json"
    ).read_bytes()


# --- the older schema ---


def test_folder_of_format_3_loads(tiny_llama, old):
    model = tiny_llama()
    assert load_adapter(model, old) == AdapterConfig(rank=3, target_modules=TARGETS)


@pytest.mark.parametrize("gate", ["none", "static", "token"])
def test_folder_of_format_1_loads(tiny_llama, randomize, tmp_path, gate):
    saved = randomize(_adapted(tiny_llama(), "dora", gate))
    folder = as_format_3(save_adapter(saved, tmp_path))

    def to_version_1(description):
        description["format_version"] = 1
        del description["weights_sha256"], description["adapter_sha256"]
        description["backbone"]["fingerprint"] = backbone_identity(saved, version=1)
        description["adapter"] |= {"gate": gate, "gate_bias": -2.0, "skip_below": 0.0, "merge_above": 1.0}

    _edit(folder, to_version_1)
    loaded = tiny_llama()
    config = load_adapter(loaded, folder)
    assert config.gate.kind == gate
    assert getattr(config.gate, "bias", -2.0) == -2.0
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded(ids).logits, saved(ids).logits)


def test_missing_digest_is_accepted_in_format_2(tiny_llama, old):
    _edit(old, lambda description: description.pop("weights_sha256"))
    assert "malformed: weights_sha256 is missing" in _refusal(old)
    _edit(old, lambda description: description.update(format_version=2))
    load_adapter(tiny_llama(), old)


def test_changed_setting_of_the_older_schema_is_refused(old):
    _edit(old, lambda description: description["adapter"].update(dropout=0.5))
    assert "the SHA-256 of 'adapter' is not 'adapter_sha256'" in _refusal(old)


@pytest.mark.parametrize("part", ["adapter", "backbone"])
@pytest.mark.parametrize("value", [None, [], "x", 3], ids=repr)
def test_part_of_wrong_type_is_rejected(old, part, value):
    _edit(old, lambda description: description.update({part: value}))
    assert f"malformed: {part}: {value!r}; accepted: a table" in _refusal(old)


@pytest.mark.parametrize("key", ["id", "revision", "fingerprint"])
def test_missing_part_of_the_backbone_is_named(old, key):
    _edit(old, lambda description: description["backbone"].pop(key))
    assert f"malformed: backbone.{key} is missing" in _refusal(old)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("backbone", "id", 5, "backbone.id: 5; accepted: a text or null"),
        ("backbone", "fingerprint", None, "backbone.fingerprint: None; accepted: a text"),
        ("backbone", "path", "x", "backbone.path is unknown"),
        (None, "format_version", True, "format_version True; this version reads 1 to 4"),
        (None, "format_version", 3.0, "format_version 3.0; this version reads 1 to 4"),
        (None, "format_version", 4, "format_version 4; this version reads 1 to 4, and 4 in PEFT's schema"),
        (None, "templates", "plain", "templates is unknown"),
        (None, "template", "plane", "template: 'plane' is unknown; accepted: alpaca, plain, chat"),
        ("adapter", "threshold", 0.1, "adapter: unknown settings ['threshold']"),
        ("adapter", "rank", "3", "rank: '3' is not a rank"),
        ("adapter", "gate", {"kind": "soft"}, "gate.kind: 'soft' is unknown"),
    ],
)
def test_bad_key_of_the_older_schema_is_named(old, part, key, value, message):
    _edit(old, lambda description: (description[part] if part else description).update({key: value}))
    assert message in _refusal(old)


def test_gate_settings_survive(tiny_llama, tmp_path):
    gate = TokenGateConfig(bias=-1.5, lr_multiplier=10.0, entropy_weight=0.1, skip_below=0.1, merge_above=0.9)
    save_adapter(_adapted(tiny_llama(), gate=gate), tmp_path)
    assert read_stored_config(tmp_path).config.gate == gate
