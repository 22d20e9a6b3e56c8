"""Adapter folders: what is written, what comes back bit by bit, and what is refused with nothing changed."""

import itertools
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import gatera_lightning.adapters.serialization as files
from gatera_lightning import (
    AdapterConfig,
    AdapterFileError,
    ConfigError,
    adapter_parameters,
    inject_adapters,
    load_adapter,
    save_adapter,
)
from gatera_lightning.adapters.fingerprint import backbone_fingerprint, weight_fingerprint
from gatera_lightning.adapters.lookup import adapted_linears

METHODS = list(itertools.product(("lora", "dora", "hira"), ("none", "static", "token")))
TARGETS = ["q_proj", "down_proj"]


def _config(update="hira", gate="token", **settings):
    alpha = None if update == "hira" else 6.0
    return AdapterConfig(
        **({"update": update, "gate": gate, "rank": 3, "alpha": alpha, "target_modules": TARGETS} | settings)
    )


def _adapted(backbone, *method, seed=0, **settings):
    inject_adapters(backbone, _config(*method, **settings), torch.Generator().manual_seed(seed))
    return backbone


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


def _snapshot(model):
    """Everything a failed load must leave alone."""
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


def _refusal(model, folder, error=AdapterFileError):
    before = _snapshot(model)
    with pytest.raises(error) as caught:
        load_adapter(model, folder)
    _assert_unchanged(model, before)
    return str(caught.value)


@pytest.fixture
def folder(tiny_llama, randomize, tmp_path):
    """A saved GateRA adapter of the tiny Llama of seed 0."""
    return save_adapter(randomize(_adapted(tiny_llama())), tmp_path / "adapter")


@pytest.fixture(params=["adapted", "plain"])
def model(request, tiny_llama):
    """The Llama that ``folder`` belongs to: with an adapter of the same shape, or with none."""
    return _adapted(tiny_llama(), seed=9) if request.param == "adapted" else tiny_llama()


def _edit(folder, change):
    path = folder / "adapter_config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    change(description)
    path.write_text(json.dumps(description), encoding="utf-8")


@pytest.mark.parametrize("start", ["plain", "adapted"])
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_what_is_saved_comes_back_bit_by_bit(tiny_llama, randomize, tmp_path, update, gate, start):
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
def test_other_dtypes_come_back_bit_by_bit(tiny_llama, randomize, tmp_path, backbone, adapter):
    dtype = getattr(torch, backbone)
    saved = randomize(_adapted(tiny_llama(dtype), adapter_dtype=adapter))
    loaded = tiny_llama(dtype)
    load_adapter(loaded, save_adapter(saved, tmp_path))
    for name, value in adapter_parameters(saved).items():
        assert adapter_parameters(loaded)[name].dtype == getattr(torch, adapter)
        assert torch.equal(adapter_parameters(loaded)[name], value)


def test_the_folder_says_what_it_holds(tiny_llama, tmp_path):
    model = _adapted(tiny_llama(), "dora", "static", layers=[1], dropout=0.25, gate_bias=-2.0)
    save_adapter(model, tmp_path, backbone="meta-llama/Llama-3.2-1B", revision="abc123")
    description = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    layers = adapted_linears(model)
    assert description == {
        "format_version": 1,
        "adapter": {
            "update": "dora",
            "gate": "static",
            "rank": 3,
            "alpha": 6.0,
            "dropout": 0.25,
            "target_modules": TARGETS,
            "layers": [1],
            "gate_bias": -2.0,
            "skip_below": 0.0,
            "merge_above": 1.0,
            "adapter_dtype": "float32",
        },
        "backbone": {
            "id": "meta-llama/Llama-3.2-1B",
            "revision": "abc123",
            "fingerprint": backbone_fingerprint(
                {n: weight_fingerprint(m.base.weight) for n, m in layers.items()}
            ),
        },
    }
    config, origin = files.read_adapter_config(tmp_path)
    assert config == AdapterConfig(**description["adapter"]) == next(iter(layers.values())).config
    assert origin == description["backbone"]


def test_the_backbone_is_named_after_the_hugging_face_config(tiny_llama, tmp_path):
    model = _adapted(tiny_llama())
    model.config._name_or_path, model.config._commit_hash = "HuggingFaceTB/SmolLM2-135M", "93efa2f"
    _, origin = files.read_adapter_config(save_adapter(model, tmp_path / "named"))
    assert (origin["id"], origin["revision"]) == ("HuggingFaceTB/SmolLM2-135M", "93efa2f")
    bare = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inject_adapters(bare, AdapterConfig(rank=2, target_modules=["0"]))
    _, origin = files.read_adapter_config(save_adapter(bare, tmp_path / "bare"))
    assert (origin["id"], origin["revision"]) == (None, None)


def test_a_folder_holds_json_and_safetensors_of_the_adapter_alone(folder, tiny_llama):
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = adapter_parameters(_adapted(tiny_llama()))
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (p.shape, p.dtype) for n, p in expected.items()
    }


def test_nothing_is_pickled(folder, tiny_llama, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    model = tiny_llama()
    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    load_adapter(model, folder)


def test_saving_replaces_an_older_adapter(folder, tiny_llama, randomize):
    newer = randomize(_adapted(tiny_llama(), "lora", "none"), seed=8)
    save_adapter(newer, folder)
    assert len(list(folder.iterdir())) == 2
    loaded = tiny_llama()
    assert load_adapter(loaded, folder).update == "lora"
    assert torch.equal(_logits(loaded), _logits(newer))


def test_a_save_that_fails_leaves_the_older_adapter_whole(folder, tiny_llama, randomize, monkeypatch):
    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half a fi")
        raise OSError("no space left on device")

    older = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(files, "save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_adapter(randomize(_adapted(tiny_llama()), seed=8), folder)
    assert {name: (folder / name).read_bytes() for name in older} == older
    load_adapter(tiny_llama(), folder)


def test_a_model_without_adapter_is_not_saved(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="no adapted layers"):
        save_adapter(tiny_llama(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_missing_folder_or_file_is_named(folder, model, tmp_path):
    assert "no adapter here (adapter_config.json is missing)" in _refusal(model, tmp_path / "elsewhere")
    (folder / "adapter_model.safetensors").rename(tmp_path / "weights")
    assert "incomplete (adapter_model.safetensors is missing)" in _refusal(model, folder)
    (tmp_path / "weights").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").unlink()
    assert "no adapter here" in _refusal(model, folder)


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
def test_a_malformed_description_is_refused(folder, model, text):
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "adapter_config.json: malformed" in _refusal(model, folder)


@pytest.mark.parametrize("part", ["adapter", "backbone"])
@pytest.mark.parametrize("value", [None, [], "x", 3], ids=repr)
def test_a_part_of_another_type_is_refused(folder, model, part, value):
    _edit(folder, lambda description: description.update({part: value}))
    assert "malformed" in _refusal(model, folder)


@pytest.mark.parametrize("key", ["id", "revision", "fingerprint"])
def test_a_description_without_its_backbone_is_refused(folder, tiny_llama, key):
    _edit(folder, lambda description: description["backbone"].pop(key))
    _refusal(tiny_llama(seed=1), folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", "3"),
        ("rank", None),
        ("rank", 2.5),
        ("rank", -1),
        ("target_modules", 7),
        ("layers", "all"),
        ("update", "vera"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(folder, tiny_llama, name, value):
    _edit(folder, lambda description: description["adapter"].update({name: value}))
    assert name in _refusal(tiny_llama(), folder, (AdapterFileError, ConfigError))


def test_unknown_settings_are_refused_by_name(folder, model):
    _edit(folder, lambda description: description["adapter"].update(threshold=0.1))
    assert "unknown adapter settings ['threshold']" in _refusal(model, folder)


def test_a_newer_format_is_refused(folder, model):
    _edit(folder, lambda description: description.update(format_version=2, adapter={"from": "the future"}))
    assert "format_version 2; this version reads 1" in _refusal(model, folder)


@pytest.mark.parametrize(
    "damage",
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
def test_damaged_weights_are_refused(folder, model, damage):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "adapter_model.safetensors: damaged, not a readable safetensors file" in _refusal(model, folder)


@pytest.mark.parametrize("adapted", [True, False])
def test_another_backbone_is_refused(folder, tiny_llama, adapted):
    model = _adapted(tiny_llama(seed=1)) if adapted else tiny_llama(seed=1)
    text = _refusal(model, folder)
    assert "was trained on another backbone" in text
    assert "A base model and its instruct version are different backbones." in text


@pytest.mark.parametrize(
    "settings", [{"rank": 2}, {"update": "lora"}, {"gate": "static"}, {"gate": "none"}], ids=str
)
def test_a_model_adapted_in_another_way_is_refused(folder, tiny_llama, settings):
    text = _refusal(_adapted(tiny_llama(), **settings), folder)
    assert "holds update=hira gate=token rank=3 scale=1" in text
    assert "the model was adapted with" in text
    assert all(f"{name}={value}" in text for name, value in settings.items())


def test_another_alpha_is_refused(tiny_llama, tmp_path):
    save_adapter(_adapted(tiny_llama(), "lora"), tmp_path)
    assert "scale=2, but the model was adapted with" in _refusal(
        _adapted(tiny_llama(), "lora", alpha=3.0), tmp_path
    )


def test_other_layers_are_refused(folder, tiny_llama):
    text = _refusal(_adapted(tiny_llama(), target_modules=["q_proj", "up_proj"]), folder)
    assert "8 parameters are not in the file (model.layers.0.mlp.up_proj.gate.bias" in text
    assert "8 tensors have no place in the model (model.layers.0.mlp.down_proj.gate.bias" in text
    assert "not in the file" in _refusal(tiny_llama(layers=3), folder)


@pytest.mark.parametrize("adapted", [True, False])
def test_another_shape_is_refused(folder, tiny_llama, adapted):
    model = tiny_llama(hidden_size=48)
    text = _refusal(_adapted(model) if adapted else model, folder)
    assert "does not fit this model" in text
    assert (
        "model.layers.0.mlp.down_proj.update.b is (32, 3) torch.float32 there, (48, 3) torch.float32 here"
        in text
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_weights_of_another_dtype_are_refused(folder, model, dtype):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    text = _refusal(model, folder)
    assert "dtype" in text or str(dtype).removeprefix("torch.") in text


def test_one_surplus_or_missing_tensor_is_refused(folder, model, tmp_path):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": torch.zeros(2)}, path)
    assert "1 tensors have no place in the model (lm_head.weight" in _refusal(model, folder)
    tensors.pop("model.layers.1.self_attn.q_proj.gate.bias")
    save_file(tensors, path)
    assert "1 parameters are not in the file (model.layers.1.self_attn.q_proj.gate.bias" in _refusal(
        model, folder
    )


def test_the_same_checkpoint_in_float32_takes_an_adapter_of_bfloat16(tiny_llama, randomize, tmp_path):
    save_adapter(randomize(_adapted(tiny_llama(torch.bfloat16))), tmp_path)
    upcast = tiny_llama(torch.bfloat16).float()
    load_adapter(upcast, tmp_path)
    shutil.rmtree(tmp_path)
    save_adapter(upcast, tmp_path)
    load_adapter(tiny_llama(torch.bfloat16), tmp_path)


def test_a_fingerprint_belongs_to_values_and_shape():
    weight = torch.randn(160, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    own = weight_fingerprint(weight)
    assert own == weight_fingerprint(weight.float()) == weight_fingerprint(weight.clone().requires_grad_())
    assert own == weight_fingerprint(weight.t().contiguous().t())
    assert own != weight_fingerprint(weight.reshape(130, 160))
    assert own != weight_fingerprint(weight.t())
    finetuned = weight + 0.01 * torch.randn(160, 130, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert own != weight_fingerprint(finetuned)
    changed = weight.clone()
    changed[0, 0] += 1
    assert own != weight_fingerprint(changed)


def test_the_fingerprint_of_a_backbone_belongs_to_names_and_not_to_their_order():
    one, other = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    assert (
        backbone_fingerprint(one) == backbone_fingerprint(other) != backbone_fingerprint({"a": "2", "b": "1"})
    )
    assert backbone_fingerprint({"a": "1"}) != backbone_fingerprint({"c": "1"})


def test_an_adapter_keeps_the_fingerprint_of_its_backbone_while_it_learns(
    folder, tiny_llama, randomize, tmp_path
):
    model = randomize(_adapted(tiny_llama()), seed=8)
    save_adapter(model, tmp_path / "later")
    assert files.read_adapter_config(tmp_path / "later")[1] == files.read_adapter_config(folder)[1]
