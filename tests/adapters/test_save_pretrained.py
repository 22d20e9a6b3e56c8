"""``save_pretrained`` of an adapted model writes its adapter, and that of a merged model the model."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from gatera_lightning import (
    AdapterConfig,
    AdapterFileError,
    ConfigError,
    adapter_parameters,
    inject_adapters,
    load_adapter,
    merge_adapter,
)
from gatera_lightning.adapters.injection import remove_adapters


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits


def _perturb(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def backbone(tiny_llama, tmp_path):
    """A function that loads the same backbone each time, from its folder."""
    tiny_llama().save_pretrained(tmp_path / "backbone")
    return lambda: LlamaForCausalLM.from_pretrained(tmp_path / "backbone")


@pytest.fixture
def adapted(backbone):
    model = backbone()
    inject_adapters(model, AdapterConfig(rank=2))
    return _perturb(model)


def _check_folder(folder, backbone, expected):
    """Check that a folder is an adapter folder, from which the model's output comes back."""
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not list(folder.glob("model*"))
    assert not (folder / "config.json").exists()
    model = backbone()
    load_adapter(model, folder)
    assert torch.equal(_logits(model), expected)


def test_adapted_model_saves_its_adapter(adapted, backbone, tmp_path):
    adapted.save_pretrained(tmp_path / "saved")
    _check_folder(tmp_path / "saved", backbone, _logits(adapted))


def test_what_transformers_passes_is_accepted(adapted, backbone, tmp_path):
    adapted.save_pretrained(
        str(tmp_path / "saved"), is_main_process=True, state_dict=adapted.state_dict(), max_shard_size="5GB"
    )
    _check_folder(tmp_path / "saved", backbone, _logits(adapted))
    adapted.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"push_to_hub": True}, r"push_to_hub=True .*model.push_to_hub\(repo_id\) uploads the adapter"),
        ({"variant": "fp16"}, "variant='fp16'"),
        ({"safe_serialization": False}, "never written as a pickle"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint=True"),
        ({"state_dict": {}}, "state_dict has other values .*export --format merged"),
    ],
)
def test_options_that_cannot_be_satisfied_are_refused(adapted, tmp_path, options, expected):
    with pytest.raises(ConfigError, match=expected):
        adapted.save_pretrained(tmp_path / "saved", **options)
    assert not (tmp_path / "saved").exists()


def test_options_by_position_are_refused_too(adapted, tmp_path):
    names = list(inspect.signature(PreTrainedModel.save_pretrained).parameters)
    values = [True, None] + [None] * (names.index("push_to_hub") - 4) + [True]
    with pytest.raises(ConfigError, match="push_to_hub=True"):
        adapted.save_pretrained(tmp_path / "saved", *values)


def test_other_values_in_state_dict_are_refused(adapted, tmp_path):
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    next(tensor for name, tensor in state.items() if name.endswith("update.b")).add_(1)
    with pytest.raises(ConfigError, match="other values of the adapter than the model"):
        adapted.save_pretrained(tmp_path / "saved", state_dict=state)


def test_folder_of_the_backbone_stays_whole(adapted, tmp_path):
    with pytest.raises(AdapterFileError, match="holds a model"):
        adapted.save_pretrained(tmp_path / "backbone")
    assert not (tmp_path / "backbone" / "adapter_config.json").exists()


def test_model_without_adapter_saves_itself(backbone, tmp_path):
    model = backbone()
    inject_adapters(model, AdapterConfig(rank=2))
    remove_adapters(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(_logits(LlamaForCausalLM.from_pretrained(tmp_path / "saved")), _logits(backbone()))


def test_merged_model_saves_its_weights(backbone, tmp_path):
    model = backbone()
    inject_adapters(model, AdapterConfig(rank=2, gate="none"))
    expected = _logits(merge_adapter(_perturb(model)))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").exists()
    assert torch.equal(_logits(LlamaForCausalLM.from_pretrained(tmp_path / "saved")), expected)


def test_other_models_of_the_class_save_themselves(adapted, backbone, tmp_path):
    backbone().save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()
    own = inspect.signature(PreTrainedModel.save_pretrained)
    assert list(own.parameters)[:4] == ["self", "save_directory", "is_main_process", "state_dict"]


def test_injection_that_fails_leaves_the_call_alone(backbone, tmp_path):
    model = backbone()
    with pytest.raises(ConfigError):
        inject_adapters(model, AdapterConfig(rank=10_000))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_class_with_a_method_of_its_own_is_guarded(tiny_llama, backbone, tmp_path):
    class Own(LlamaForCausalLM):
        def save_pretrained(self, save_directory, **options):
            raise AssertionError("not the adapter")

    model = Own.from_pretrained(tmp_path / "backbone")
    inject_adapters(model, AdapterConfig(rank=2))
    _perturb(model).save_pretrained(tmp_path / "saved")
    _check_folder(tmp_path / "saved", backbone, _logits(model))


def test_deleted_model_is_freed_at_once(backbone):
    model = backbone()
    inject_adapters(model, AdapterConfig(rank=2))
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _torch_dump(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


def _torch_read(content):
    return torch.load(io.BytesIO(content), weights_only=False)


def _torch_saved(model):
    return _torch_read(_torch_dump(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _torch_saved])
def test_copy_saves_its_own_adapter(adapted, backbone, tmp_path, duplicate):
    twin = duplicate(adapted)
    assert adapted.state_dict().keys() == twin.state_dict().keys()
    _perturb(twin, seed=5)
    twin.save_pretrained(tmp_path / "twin")
    adapted.save_pretrained(tmp_path / "own")
    assert not torch.equal(_logits(twin), _logits(adapted))
    _check_folder(tmp_path / "twin", backbone, _logits(twin))
    _check_folder(tmp_path / "own", backbone, _logits(adapted))
    remove_adapters(twin)
    adapted.save_pretrained(tmp_path / "still")
    _check_folder(tmp_path / "still", backbone, _logits(adapted))


@pytest.mark.parametrize("dump", [pickle.dumps, _torch_dump])
def test_model_read_by_another_process_saves_its_adapter(adapted, backbone, tmp_path, monkeypatch, dump):
    content = dump(adapted)
    # Another process imports Transformers' own method.
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", inspect.unwrap(PreTrainedModel.save_pretrained))
    twin = pickle.loads(content) if dump is pickle.dumps else _torch_read(content)
    twin.save_pretrained(tmp_path / "twin")
    _check_folder(tmp_path / "twin", backbone, _logits(adapted))


def test_guard_adds_nothing_to_the_state(adapted, backbone):
    keys = {name for name in adapted.state_dict() if ".base." not in name and ".update." not in name}
    assert {name for name in keys if ".gate." not in name} <= set(backbone().state_dict())


def test_model_inside_a_module_is_guarded(backbone, tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = backbone()

    outer = Outer()
    inject_adapters(outer, AdapterConfig(rank=2))
    outer.inner.save_pretrained(tmp_path / "saved")
    _check_folder(tmp_path / "saved", backbone, _logits(outer.inner))
    outer.inner.model.save_pretrained(tmp_path / "decoder")
    assert (tmp_path / "decoder" / "adapter_config.json").exists()
    remove_adapters(outer)
    outer.inner.model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()


def test_outer_model_saves_itself_after_an_inner_removal(adapted, tmp_path):
    remove_adapters(adapted.model)
    adapted.save_pretrained(tmp_path / "saved")
    assert torch.equal(_logits(LlamaForCausalLM.from_pretrained(tmp_path / "saved")), _logits(adapted))


def test_push_to_hub_uploads_the_adapter(adapted, tmp_path, monkeypatch):
    uploaded = []
    hub = type("Hub", (), {"create_repo": lambda *a, **k: type("Repo", (), {"repo_id": "me/mine"})()})
    card = type("Card", (), {"save": lambda self, path: None})
    monkeypatch.setattr("transformers.utils.hub.hf_api", hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: card())

    def upload(folder, *args, **kwargs):
        from pathlib import Path

        uploaded.extend(path.name for path in Path(folder).iterdir())

    monkeypatch.setattr(adapted, "_upload_modified_files", upload)
    adapted.push_to_hub("me/mine")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(uploaded)
    assert not [name for name in uploaded if name.startswith("model") or name == "config.json"]


def test_hugging_face_trainer_saves_the_adapter(adapted, backbone, tmp_path):
    import transformers

    rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)}] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(adapted, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    expected = _logits(adapted)
    _check_folder(tmp_path / "saved", backbone, expected)
    _check_folder(tmp_path / "run" / "checkpoint-2", backbone, expected)


def test_accelerate_saves_the_adapter(adapted, backbone, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(adapted)
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "saved",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    _check_folder(tmp_path / "saved", backbone, _logits(adapted))
