"""Adapter folders: what is written, what loads bit-identically, and what is rejected without side effects."""

import hashlib
import json
import pickle
import shutil
from importlib.metadata import version

import pytest
import torch
from adapted_layers import EVEN_UPDATES, METHODS
from safetensors.torch import load_file, save_file

import gatera_lightning.adapters.serialization as serialization
from gatera_lightning import (
    AdapterConfig,
    AdapterFileError,
    adapter_parameters,
    inject_adapters,
    load_adapter,
    save_adapter,
)
from gatera_lightning.adapters.fingerprint import backbone_fingerprint, weight_fingerprint
from gatera_lightning.adapters.gates import StaticGateConfig, TokenGateConfig
from gatera_lightning.adapters.lookup import adapted_linears

TARGETS = ["q_proj", "down_proj"]


def _config(update="hira", gate="token", **settings):
    alpha = None if "hira" in update else 6.0
    rank = 4 if update in EVEN_UPDATES else 3
    return AdapterConfig(
        **(
            {"update": update, "gate": gate, "rank": rank, "alpha": alpha, "target_modules": TARGETS}
            | settings
        )
    )


def _adapted(backbone, *method, seed=0, **settings):
    inject_adapters(backbone, _config(*method, **settings), torch.Generator().manual_seed(seed))
    return backbone


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


def _snapshot(model):
    """Return everything that a failed load must not change."""
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return modules, parameters


def _assert_unchanged(model, before):
    modules, parameters = _snapshot(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (identity, requires_grad, value) in parameters.items():
        assert (identity, requires_grad) == before[1][name][:2], name
        assert torch.equal(value, before[1][name][2]), name


def _stored(name):
    """Return the name that a parameter has in the file."""
    return "base_model.model." + name.replace(".update.", ".gatera_update.").replace(
        ".gate.", ".gatera_gate."
    )


def _rewrite(folder, tensors):
    """Replace the tensors of an adapter folder, and their digest."""
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _edit(folder, lambda description: description["gatera"].update(weights_sha256=digest))


def _refusal(model, folder, error=AdapterFileError):
    before = _snapshot(model)
    with pytest.raises(error) as caught:
        load_adapter(model, folder)
    _assert_unchanged(model, before)
    return str(caught.value)


@pytest.fixture
def folder(tiny_llama, randomize, tmp_path):
    """Save a GateRA adapter of the tiny Llama with seed 0."""
    return save_adapter(randomize(_adapted(tiny_llama())), tmp_path / "adapter")


@pytest.fixture(params=["adapted", "plain"])
def model(request, tiny_llama):
    """Return the Llama that ``folder`` belongs to, with an adapter of the same shape or without one."""
    return _adapted(tiny_llama(), seed=9) if request.param == "adapted" else tiny_llama()


def _edit(folder, change):
    path = folder / "adapter_config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    change(description)
    path.write_text(json.dumps(description), encoding="utf-8")


@pytest.mark.parametrize("start", ["plain", "adapted"])
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_saved_adapter_loads_bit_identically(tiny_llama, randomize, tmp_path, update, gate, start):
    saved = randomize(_adapted(tiny_llama(), update, gate))
    assert save_adapter(saved, tmp_path / "new" / "adapter") == tmp_path / "new" / "adapter"
    loaded = tiny_llama() if start == "plain" else _adapted(tiny_llama(), update, gate, seed=9)
    assert not torch.equal(_logits(loaded), _logits(saved))
    assert load_adapter(loaded, tmp_path / "new" / "adapter") == _config(update, gate)
    theirs, ours = adapter_parameters(saved), adapter_parameters(loaded)
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert torch.equal(_logits(loaded), _logits(saved))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == set(ours)


@pytest.mark.parametrize(("backbone", "adapter"), [("float64", "float64"), ("bfloat16", "float32")])
def test_other_dtypes_load_bit_identically(tiny_llama, randomize, tmp_path, backbone, adapter):
    dtype = getattr(torch, backbone)
    saved = randomize(_adapted(tiny_llama(dtype), adapter_dtype=adapter))
    loaded = tiny_llama(dtype)
    load_adapter(loaded, save_adapter(saved, tmp_path))
    for name, value in adapter_parameters(saved).items():
        assert adapter_parameters(loaded)[name].dtype == getattr(torch, adapter)
        assert torch.equal(adapter_parameters(loaded)[name], value)


def test_folder_describes_adapter(tiny_llama, tmp_path):
    model = _adapted(tiny_llama(), "dora", StaticGateConfig(bias=-2.0), layers=[1], dropout=0.25)
    save_adapter(model, tmp_path, backbone="meta-llama/Llama-3.2-1B", revision="abc123", template="plain")
    description = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    fingerprints = {n: weight_fingerprint(m.base.weight) for n, m in adapted_linears(model).items()}
    record = description.pop("gatera")
    assert len(record.pop("settings_sha256")) == 64
    assert record == {
        "format_version": 4,
        "weights_sha256": hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "fingerprint": backbone_fingerprint(fingerprints),
        "fingerprint_float16": backbone_fingerprint(fingerprints, 3),
        "attn_implementation": "sdpa",
        "template": "plain",
    }
    assert description == {
        "peft_type": "GATERA",
        "peft_version": version("peft"),
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": "meta-llama/Llama-3.2-1B",
        "revision": "abc123",
        "inference_mode": True,
        "update": "dora",
        "gate": {"kind": "static", "lr_multiplier": 1.0, "bias": -2.0, "entropy_weight": 0.01},
        "r": 3,
        "alpha": 6.0,
        "blocks": None,
        "stochastic_rounding": False,
        "dropout": 0.25,
        "target_modules": TARGETS,
        "exclude_modules": None,
        "layers_to_transform": [1],
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "trainable_token_indices": None,
        "adapter_dtype": "float32",
    }
    config, origin = serialization.read_adapter_config(tmp_path)
    assert config == next(iter(adapted_linears(model).values())).config
    assert (origin["id"], origin["revision"]) == ("meta-llama/Llama-3.2-1B", "abc123")
    assert serialization.trained_template(tmp_path) == "plain"


def test_backbone_name_comes_from_hugging_face_config(tiny_llama, tmp_path):
    model = _adapted(tiny_llama())
    model.config._name_or_path, model.config._commit_hash = "HuggingFaceTB/SmolLM2-135M", "93efa2f"
    _, origin = serialization.read_adapter_config(save_adapter(model, tmp_path / "named"))
    assert (origin["id"], origin["revision"]) == ("HuggingFaceTB/SmolLM2-135M", "93efa2f")
    bare = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inject_adapters(bare, AdapterConfig(rank=2, target_modules=["0"]))
    _, origin = serialization.read_adapter_config(save_adapter(bare, tmp_path / "bare"))
    assert (origin["id"], origin["revision"]) == (None, None)


def test_folder_holds_only_adapter(folder, tiny_llama):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = adapter_parameters(_adapted(tiny_llama()))
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        _stored(n): (p.shape, p.dtype) for n, p in expected.items()
    }


def test_load_does_not_unpickle(folder, tiny_llama, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    model = tiny_llama()
    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    load_adapter(model, folder)


def test_save_replaces_older_adapter(folder, tiny_llama, randomize):
    newer = randomize(_adapted(tiny_llama(), "lora", "none"), seed=8)
    save_adapter(newer, folder)
    assert len(list(folder.iterdir())) == 3
    loaded = tiny_llama()
    assert load_adapter(loaded, folder).update == "lora"
    assert torch.equal(_logits(loaded), _logits(newer))


def test_failed_save_keeps_older_adapter(folder, tiny_llama, randomize, monkeypatch):
    def disk_full(path, content):
        with path.open("wb") as file:
            file.write(content[:9])
        raise OSError("no space left on device")

    older = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "write_bytes", disk_full)
        with pytest.raises(OSError, match="no space"):
            save_adapter(randomize(_adapted(tiny_llama()), seed=8), folder)
    assert {name: (folder / name).read_bytes() for name in older} == older
    load_adapter(tiny_llama(), folder)


def test_save_rejects_model_without_adapter(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="no adapted layers"):
        save_adapter(tiny_llama(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_load_names_missing_file(folder, model, tmp_path):
    assert "not an adapter folder (adapter_config.json is missing)" in _refusal(model, tmp_path / "elsewhere")
    (folder / "adapter_model.safetensors").rename(tmp_path / "weights")
    assert "incomplete (adapter_model.safetensors is missing)" in _refusal(model, folder)
    (tmp_path / "weights").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").unlink()
    assert "not an adapter folder" in _refusal(model, folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format_version": 1}',
        '{"format_version": 1, "adapter": {}}',
        b"\xff\xfe\x00{",
    ],
    ids=repr,
)
def test_load_rejects_malformed_description(folder, model, text):
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "adapter_config.json: malformed" in _refusal(model, folder)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: bytes(byte ^ 0x55 for byte in data),
        lambda data: data[:8] + bytes(byte ^ 0x55 for byte in data[8:40]) + data[40:],
        lambda data: b"\x80\x04" + data[2:],
    ],
    ids=["empty", "no_header", "half", "one_byte_short", "one_byte_more", "garbage", "bad_header", "pickle"],
)
def test_load_rejects_corrupt_weights(folder, model, corrupt):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(corrupt(path.read_bytes()))
    assert "adapter_model.safetensors: corrupt, not a readable safetensors file" in _refusal(model, folder)


@pytest.mark.parametrize("adapted", [True, False])
def test_load_rejects_other_backbone(folder, tiny_llama, adapted):
    model = _adapted(tiny_llama(seed=1)) if adapted else tiny_llama(seed=1)
    text = _refusal(model, folder)
    assert "was trained on another backbone" in text
    assert "A base model and its instruct version are different backbones." in text


@pytest.mark.parametrize(
    "settings", [{"rank": 2}, {"update": "lora"}, {"gate": "static"}, {"gate": "none"}], ids=str
)
def test_load_rejects_model_with_other_method(folder, tiny_llama, settings):
    text = _refusal(_adapted(tiny_llama(), **settings), folder)
    assert "holds update=hira gate=token rank=3 scale=1.0" in text
    assert "the model was adapted with" in text
    assert all(f"{name}={value}" in text for name, value in settings.items())


def test_load_rejects_other_blocks(tiny_llama, tmp_path):
    """The shapes of both are equal."""
    folder = save_adapter(_adapted(tiny_llama(), "block_hira", rank=4, blocks=4), tmp_path)
    with pytest.raises(AdapterFileError, match=r"update=block_hira .*blocks=4.*blocks=2"):
        load_adapter(_adapted(tiny_llama(), "block_hira", rank=4, blocks=2), folder)


def test_load_rejects_other_alpha(tiny_llama, tmp_path):
    save_adapter(_adapted(tiny_llama(), "lora"), tmp_path)
    assert "scale=2.0, but the model was adapted with" in _refusal(
        _adapted(tiny_llama(), "lora", alpha=3.0), tmp_path
    )


def test_load_rejects_other_layers(folder, tiny_llama):
    text = _refusal(_adapted(tiny_llama(), target_modules=["q_proj", "up_proj"]), folder)
    assert "8 missing tensors (model.layers.0.mlp.up_proj.gate.bias" in text
    assert "8 unexpected tensors (model.layers.0.mlp.down_proj.gate.bias" in text
    assert "missing tensors" in _refusal(tiny_llama(layers=3), folder)


@pytest.mark.parametrize("adapted", [True, False])
def test_load_rejects_other_shape(folder, tiny_llama, adapted):
    model = tiny_llama(hidden_size=48)
    text = _refusal(_adapted(model) if adapted else model, folder)
    assert "does not fit this model" in text
    assert "model.layers.0.mlp.down_proj.update.b is stored as (32, 3) torch.float32" in text
    assert "this model needs (48, 3) torch.float32" in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_load_rejects_other_dtype(folder, model, dtype):
    path = folder / "adapter_model.safetensors"
    _rewrite(folder, {name: tensor.to(dtype) for name, tensor in load_file(path).items()})
    text = _refusal(model, folder)
    assert "dtype" in text or str(dtype).removeprefix("torch.") in text


def test_load_rejects_unexpected_or_missing_tensor(folder, model, tmp_path):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    _rewrite(folder, tensors | {"lm_head.weight": torch.zeros(2)})
    assert "1 unexpected tensors (lm_head.weight" in _refusal(model, folder)
    tensors.pop(_stored("model.layers.1.self_attn.q_proj.gate.bias"))
    _rewrite(folder, tensors)
    assert "1 missing tensors (model.layers.1.self_attn.q_proj.gate.bias" in _refusal(model, folder)


def test_adapter_loads_into_same_checkpoint_in_other_dtype(tiny_llama, randomize, tmp_path):
    save_adapter(randomize(_adapted(tiny_llama(torch.bfloat16))), tmp_path)
    upcast = tiny_llama(torch.bfloat16).float()
    load_adapter(upcast, tmp_path)
    shutil.rmtree(tmp_path)
    save_adapter(upcast, tmp_path)
    load_adapter(tiny_llama(torch.bfloat16), tmp_path)


def test_fingerprint_does_not_change_with_training(folder, tiny_llama, randomize, tmp_path):
    model = randomize(_adapted(tiny_llama()), seed=8)
    save_adapter(model, tmp_path / "later")
    assert (
        serialization.read_adapter_config(tmp_path / "later")[1]
        == serialization.read_adapter_config(folder)[1]
    )


def test_gate_settings_are_saved(tiny_llama, tmp_path):
    gate = TokenGateConfig(bias=-1.5, lr_multiplier=10.0, entropy_weight=0.1, skip_below=0.1, merge_above=0.9)
    save_adapter(_adapted(tiny_llama(), gate=gate), tmp_path)
    assert serialization.read_adapter_config(tmp_path)[0].gate == gate
    assert load_adapter(tiny_llama(), tmp_path).gate == gate


# --- what must not be saved or loaded ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["mlp.down_proj.update.a", "self_attn.q_proj.update.b", "self_attn.q_proj.gate.bias"]
)
def test_non_finite_values_are_neither_saved_nor_loaded(folder, tiny_llama, tmp_path, name, value):
    name = f"model.layers.1.{name}"
    model = _adapted(tiny_llama())
    with torch.no_grad():
        adapter_parameters(model)[name].view(-1)[-1] = value
    with pytest.raises(AdapterFileError, match=f"not saved, because {name} holds NaN or infinite"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[_stored(name)].view(-1)[-1] = value
    _rewrite(folder, tensors)
    assert f"{name} holds NaN or infinite values" in _refusal(tiny_llama(), folder)


def test_one_changed_byte_anywhere_is_rejected(folder, tiny_llama):
    path, model = folder / "adapter_model.safetensors", tiny_llama()
    content = path.read_bytes()
    for position in {*range(0, len(content), len(content) // 40), len(content) - 1}:
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert "adapter_model.safetensors: corrupt" in _refusal(model, folder)
    path.write_bytes(content)
    load_adapter(model, folder)


def test_template_of_other_data_is_not_stored(tiny_llama, tmp_path, caplog):
    save_adapter(_adapted(tiny_llama()), tmp_path, template="mine")
    assert "the prompt template 'mine' is not stored" in caplog.text
    load_adapter(tiny_llama(), tmp_path)


def test_folder_of_a_model_is_not_written_to(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(AdapterFileError, match=r"holds a model \(config.json\)"):
        save_adapter(_adapted(model), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# --- models that were cast or wrapped ---


@pytest.mark.parametrize("saved_as", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("adapter_dtype", ["float32", "float64"])
def test_cast_model_saves_what_loads(tiny_llama, randomize, tmp_path, saved_as, adapter_dtype):
    model = randomize(_adapted(tiny_llama(), adapter_dtype=adapter_dtype)).to(saved_as)
    values = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    save_adapter(model, tmp_path)
    loaded = tiny_llama()
    config = load_adapter(loaded, tmp_path)
    assert config.adapter_dtype == ("float64" if saved_as == torch.float64 else adapter_dtype)
    assert all(
        torch.equal(parameter, values[name].to(parameter.dtype))
        for name, parameter in adapter_parameters(loaded).items()
    )


def _compiled(model):
    return torch.compile(model, backend="eager")


def _with_compiled_layer(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def _with_compiled_linear(model):
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.compile(attention.q_proj, backend="eager")
    return model


def _with_checkpoint_wrapper(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        _compiled,
        _with_compiled_layer,
        _with_compiled_linear,
        _with_checkpoint_wrapper,
        torch.nn.DataParallel,
        lambda model: torch.nn.DataParallel(_compiled(model)),
    ],
    ids=["compiled", "compiled layer", "compiled linear", "checkpoint wrapper", "parallel", "both"],
)
def test_wrapped_model_saves_and_loads_plain_names(folder, tiny_llama, tmp_path, wrap):
    model = tiny_llama()
    load_adapter(model, folder)
    wrapped = wrap(model)
    save_adapter(wrapped, tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        folder / "adapter_model.safetensors"
    ).read_bytes()
    load_adapter(tiny_llama(), tmp_path / "again")
    load_adapter(wrapped, folder)


def test_changed_setting_is_refused(folder, tiny_llama):
    _edit(folder, lambda description: description.update(dropout=0.5))
    assert "the SHA-256 of the settings is not 'gatera.settings_sha256'" in _refusal(tiny_llama(), folder)


def test_backbone_may_move_without_a_new_adapter(folder, tiny_llama):
    _edit(folder, lambda description: description.update(base_model_name_or_path="elsewhere"))
    load_adapter(tiny_llama(), folder)


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16])
def test_adapter_fits_the_backbone_in_float16(tiny_llama, randomize, tmp_path, saved_as):
    save_adapter(randomize(_adapted(tiny_llama(saved_as))), tmp_path)
    load_adapter(tiny_llama(saved_as).half(), tmp_path)
    with pytest.raises(AdapterFileError, match="another backbone"):
        load_adapter(tiny_llama(saved_as, seed=1).half(), tmp_path)


def test_adapter_of_a_float16_backbone_fits_the_original(tiny_llama, tmp_path):
    save_adapter(_adapted(tiny_llama().half()), tmp_path)
    load_adapter(tiny_llama(), tmp_path)


def test_path_of_a_file_is_refused(tiny_llama, tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(AdapterFileError, match="adapter: the adapter is not saved, because this is a file"):
        save_adapter(_adapted(tiny_llama()), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


def test_pickle_is_refused_by_name(folder, model):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, folder / "adapter_model.bin")
    assert "adapter_model.bin: a pickle, which can run code" in _refusal(model, folder)
