"""A draft adapter changes the last tokens of a forward pass, and is no part of the model it drafts for."""

import peft
import pytest
import torch
from draft_folders import ALL_SEVEN, draft_folder
from safetensors.torch import load_file, save_file

from gatera_lightning import (
    AdapterConfig,
    AdapterFileError,
    adapter_parameters,
    inject_adapters,
    load_adapter,
    record_gates,
    save_adapter,
)
from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.adapters.identity import adapter_identity, backbone_identity

IDS = torch.arange(24).reshape(3, 8)


@pytest.fixture
def gated(tiny_llama, randomize):
    """A backbone with a trained GateRA adapter."""
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(rank=3), torch.Generator().manual_seed(0))
    return randomize(model).eval()


@pytest.mark.parametrize("peft", [False, True], ids=["own_folder", "folder_of_peft"])
@pytest.mark.parametrize("over", ["backbone", "adapter"])
def test_clean_tokens_keep_their_bits_and_drafted_ones_get_the_update(
    tiny_llama, gated, tmp_path, over, peft
):
    model = gated if over == "adapter" else tiny_llama().eval()
    draft = load_draft_adapter(model, draft_folder(tiny_llama(), tmp_path / "draft", peft=peft))
    seen, layer = [], model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        expected = model(IDS).logits
        with draft.on_last(3, (3, 8)):
            hook = layer.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
            found = model(IDS).logits
            hook.remove()
        assert torch.equal(found[:, :5], expected[:, :5])
        assert bool((found[:, 5:] != expected[:, 5:]).any(-1).all())
        assert torch.equal(model(IDS).logits, expected)

        trained = tiny_llama()
        load_adapter(trained, tmp_path / "draft")
        update = trained.model.layers[1].mlp.down_proj.update
        (x, y) = seen[0]
        difference = y - layer(x)
    assert not difference[:, :5].any()
    torch.testing.assert_close(difference[:, 5:], update.delta(x, None)[:, 5:], atol=1e-5, rtol=1e-5)


def test_the_models_own_adapter_is_all_that_others_see(tiny_llama, gated, tmp_path):
    def seen():
        with torch.no_grad(), record_gates(gated) as gates:
            gated(IDS[:, :5])
        tensors = {name: tensor.clone() for name, tensor in gated.state_dict().items()}
        return (
            tensors,
            {**adapter_parameters(gated)},
            adapter_identity(gated),
            backbone_identity(gated),
            gates,
        )

    before = seen()
    draft = load_draft_adapter(gated, draft_folder(tiny_llama(), tmp_path / "draft"))
    with torch.no_grad(), record_gates(gated) as gates, draft.on_last(3, (3, 8)):
        gated(IDS)
        save_adapter(gated, tmp_path / "saved")
    after = seen()
    assert before[1:4] == after[1:4]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert gates.names == before[4].names
    for clean, mixed in zip(before[4].logits, gates.logits, strict=True):
        torch.testing.assert_close(mixed[:, :5], clean)
    again = tiny_llama().eval()
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(again(IDS).logits, gated(IDS).logits)


@pytest.mark.parametrize(
    ("other", "settings", "message"),
    [
        ({"seed": 1}, {}, "was trained on another backbone"),
        ({"intermediate_size": 64}, {}, r"mlp.down_proj has .* \(48, 32\).* \(64, 32\)"),
        ({"layers": 3}, {}, "has no linear layer model.layers.2"),
        ({"vocab_size": 96}, {}, "was trained on another backbone"),
        ({}, {"update": "hira", "alpha": None}, "update 'hira' with gate 'position' cannot draft"),
        ({}, {"gate": "token"}, "update 'lora' with gate 'token' cannot draft"),
    ],
    ids=["fingerprint", "sizes", "layers", "vocabulary", "update", "gate"],
)
def test_adapter_of_another_model_is_refused(tiny_llama, gated, tmp_path, other, settings, message):
    folder = draft_folder(tiny_llama(**other), tmp_path / "draft", **settings)
    with pytest.raises(AdapterFileError, match=message) as error:
        load_draft_adapter(gated, folder)
    if other:
        offered = "accepted: a draft adapter of this model, or decoding without drafts"
        assert str(error.value).endswith(offered)


def test_values_that_are_not_finite_are_refused(tiny_llama, gated, tmp_path):
    folder = draft_folder(tiny_llama(), tmp_path / "draft", peft=True)  # PEFT writes no hash
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(AdapterFileError, match="holds NaN or infinite values; accepted: finite values"):
        load_draft_adapter(gated, folder)


def test_adapted_head_is_refused(tiny_llama, gated, tmp_path):
    """It reads only the tokens whose logits are asked for; folders of PEFT may adapt it."""
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(AdapterFileError, match="adapts the head lm_head, which does not see every token"):
        load_draft_adapter(gated, tmp_path)


def test_layers_that_see_some_tokens_are_refused(tiny_llama, tmp_path):
    model = tiny_llama().eval()
    draft = load_draft_adapter(model, draft_folder(tiny_llama(), tmp_path / "draft"))
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad(), draft.on_last(1, (2, 3)):
        flat = layer(torch.ones(6, 32)).unflatten(0, (2, 3))
        assert torch.equal(flat, layer(torch.ones(2, 3, 32)))
        assert not torch.equal(flat[:, 1], flat[:, 2])
        with pytest.raises(ValueError, match=r"tokens \(4,\) of a forward pass of \(2, 3\)"):
            layer(torch.ones(4, 32))
        with pytest.raises(RuntimeError, match="cannot be nested"), draft.on_last(1, (2, 3)):
            pass
    assert len(ALL_SEVEN) * 2 == len(draft.layer_names)
