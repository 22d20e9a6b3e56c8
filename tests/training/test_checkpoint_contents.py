"""What a checkpoint holds of the model."""

import pytest

from gatera_lightning import adapter_parameters
from gatera_lightning.checkpointing.contents import check_entries
from gatera_lightning.errors import CheckpointError
from gatera_lightning.training.checkpoint_contents import (
    adapter_key_problems,
    check_checkpoint_fits,
    describe_adapter,
    keep_adapter_tensors,
)


def test_keep_adapter_tensors_removes_everything_else(build):
    module = build()
    names = list(adapter_parameters(module.model))
    own = {f"module.model.{name}": 1 for name in names}
    state = own | {"module.model.lm_head.weight": 2, "module.validation_metrics.loss.sum": 3}
    keep_adapter_tensors(state, module.model, "module.")
    assert state == own
    keep_adapter_tensors(state, None, "module.")
    assert state == {}


def test_missing_and_unexpected_tensors_are_named(build):
    module = build()
    name = next(f"model.{name}" for name in adapter_parameters(module.model))
    missing = [name, "model.lm_head.weight"]
    assert adapter_key_problems(module.model, missing, ["other"], strict=False) == ([name], ["other"])
    with pytest.raises(RuntimeError) as caught:
        adapter_key_problems(module.model, missing, ["other"], strict=True)
    assert str(caught.value) == f"missing adapter tensors: ['{name}']; unexpected tensors: ['other']"
    assert adapter_key_problems(module.model, missing[1:], [], strict=True) == ([], [])


def test_checkpoint_of_same_module_fits(build):
    module = build()
    checkpoint = {"state_dict": module.state_dict()}
    checkpoint |= describe_adapter(module.model, module.adapter, module.backbone)
    check_entries(checkpoint, "the checkpoint")
    check_checkpoint_fits(checkpoint, module.model)
    assert checkpoint["adapter"]["gate"]["kind"] == "token"
    assert set(checkpoint["backbone"]) == {
        *("id", "revision", "fingerprint", "fingerprint_float16", "attn_implementation")
    }


def test_checkpoint_of_other_backbone_is_rejected(build):
    module = build()
    checkpoint = {"state_dict": module.state_dict()}
    checkpoint |= describe_adapter(module.model, module.adapter, module.backbone)
    checkpoint["backbone"] |= {"fingerprint": "0" * 64, "fingerprint_float16": "0" * 64}
    with pytest.raises(CheckpointError, match="the checkpoint: was trained on another backbone"):
        check_checkpoint_fits(checkpoint, module.model)
