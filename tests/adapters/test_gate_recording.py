"""Recorded gate logits: whose they are, when they are taken, and their gradient under gradient checkpointing."""

import pytest
import torch
import torch.nn.functional as F

from gatera_lightning import AdapterConfig, adapter_parameters, inject_adapters, record_gates
from gatera_lightning.adapters.gate_recording import GateRecord
from gatera_lightning.adapters.lookup import adapted_linears

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]


def _adapted(tiny_llama, randomize, gate="token", dtype="float32", update="hira"):
    model = tiny_llama(getattr(torch, dtype), initializer_range=0.2)
    config = AdapterConfig(update=update, gate=gate, rank=3, target_modules=TARGETS, adapter_dtype=dtype)
    inject_adapters(model, config, torch.Generator().manual_seed(0))
    return randomize(model)


def _tokens(batch=2, length=5):
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def _entropy(z):
    """-(g log g + (1 - g) log(1 - g)) of g = sigmoid(z), averaged."""
    return -(torch.sigmoid(z) * F.logsigmoid(z) + torch.sigmoid(-z) * F.logsigmoid(-z)).mean()


@pytest.mark.parametrize("gate", ["static", "token"])
def test_logits_are_those_of_every_layer_in_order(tiny_llama, randomize, gate):
    model, seen = _adapted(tiny_llama, randomize, gate), []
    for name, layer in adapted_linears(model).items():
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: seen.append((name, layer.gate, args[0]))
        )
    with record_gates(model) as record:
        model(_tokens())
    assert record.names == [name for name, _, _ in seen]
    assert record.names == [
        f"model.layers.{i}.{n}"
        for i in range(2)
        for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    for (_, own, x), z in zip(seen, record.logits, strict=True):
        expected = own.bias + (x @ own.weight if gate == "token" else torch.zeros(x.shape[:-1]))
        torch.testing.assert_close(z, expected)
        assert z.shape == (2, 5)
        assert z.requires_grad
    stacked = record.stacked(torch.ones(2, 5))
    assert stacked.shape == (8, 2, 5)
    assert all(torch.equal(mine, z) for mine, z in zip(stacked, record.logits, strict=True))


def test_recording_changes_no_output(tiny_llama, randomize):
    model, tokens = _adapted(tiny_llama, randomize), _tokens()
    expected = model(tokens).logits
    with record_gates(model):
        assert torch.equal(model(tokens).logits, expected)


def test_nothing_is_recorded_outside_the_block(tiny_llama, randomize):
    model = _adapted(tiny_llama, randomize)
    model(_tokens())
    with record_gates(model) as record:
        assert record.names == []
        model(_tokens())
        model(_tokens())
        assert len(record.names) == 16
    model(_tokens())
    assert len(record.names) == len(record.logits) == 16
    assert all(layer.on_gate is None for layer in adapted_linears(model).values())
    with record_gates(model) as second:
        model(_tokens())
    assert (len(record.names), len(second.names)) == (16, 8)


def test_recordings_cannot_be_nested(tiny_llama, randomize):
    model = _adapted(tiny_llama, randomize)
    with record_gates(model) as record:
        with pytest.raises(RuntimeError, match="nested"), record_gates(model):
            pass
        model(_tokens())
    assert len(record.names) == 8  # the outer recording goes on
    with record_gates(model) as record:
        model(_tokens())
    assert len(record.names) == 8


def test_an_error_inside_the_block_ends_the_recording(tiny_llama, randomize):
    model = _adapted(tiny_llama, randomize)
    with pytest.raises(KeyError), record_gates(model):
        raise KeyError("the step failed")
    assert all(layer.on_gate is None for layer in adapted_linears(model).values())


def test_two_models_are_recorded_apart(tiny_llama, randomize):
    first, second = _adapted(tiny_llama, randomize), _adapted(tiny_llama, randomize, "static")
    with record_gates(first) as record, record_gates(second) as other:
        first(_tokens())
        assert (len(record.names), len(other.names)) == (8, 0)


def test_without_gates_there_is_nothing_to_record(tiny_llama, randomize):
    for model in (_adapted(tiny_llama, randomize, "none"), tiny_llama()):
        with record_gates(model) as record:
            model(_tokens())
        assert record.names == record.logits == []
        assert record.stacked(torch.ones(2, 5)) is None


def test_flattened_tokens_are_stacked_in_the_shape_of_the_batch():
    flat = torch.arange(6.0)
    record = GateRecord(["a", "b"], [flat, flat.reshape(2, 3) + 10])
    assert torch.equal(record.stacked(torch.ones(2, 3)), torch.stack([flat, flat + 10]).reshape(2, 2, 3))


def test_a_layer_that_saw_other_tokens_is_refused():
    record = GateRecord(["a", "experts.0"], [torch.zeros(2, 3), torch.zeros(4)])
    with pytest.raises(ValueError, match=r"gate of experts\.0 saw 4 tokens of a batch of \(2, 3\)"):
        record.stacked(torch.ones(2, 3))


@pytest.mark.parametrize("gate", ["static", "token"])
def test_without_gradients_logits_are_recorded_without_a_graph(tiny_llama, randomize, gate):
    model = _adapted(tiny_llama, randomize, gate)
    with torch.no_grad(), record_gates(model) as record:
        model(_tokens())
    assert len(record.names) == 8
    assert all(z.grad_fn is None for z in record.logits)
    model.requires_grad_(False)
    with record_gates(model) as frozen:
        model(_tokens())
    assert all(torch.equal(z, z_) for z, z_ in zip(record.logits, frozen.logits, strict=True))


def _step(model):
    """Gradients of the task's loss plus the gates' entropy; the record; and the forwards of the first layer."""
    forwards = []
    next(iter(adapted_linears(model).values())).register_forward_hook(lambda *_: forwards.append(1))
    tokens = _tokens()
    with record_gates(model) as record:
        logits = model(tokens, use_cache=False).logits
    task = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    (task + 0.5 * _entropy(record.stacked(torch.ones_like(tokens)))).backward()
    return {name: p.grad for name, p in adapter_parameters(model).items()}, record, len(forwards)


@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
@pytest.mark.parametrize("gate", ["static", "token"])
def test_checkpointing_keeps_the_gradient_of_the_entropy(tiny_llama, randomize, gate, update):
    plain = _adapted(tiny_llama, randomize, gate, "float64", update).train()
    checkpointed = _adapted(tiny_llama, randomize, gate, "float64", update).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    expected, _, once = _step(plain)
    actual, record, twice = _step(checkpointed)
    assert (once, twice) == (1, 2)  # recomputed in backward,
    assert record.names == list(adapted_linears(checkpointed))  # but recorded once
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_the_entropy_reaches_the_gates_and_through_the_inputs_the_layers_before(tiny_llama, randomize):
    model = _adapted(tiny_llama, randomize, "token", "float64")
    with record_gates(model) as record:
        model(_tokens())
    _entropy(record.logits[-1]).backward()
    params = adapter_parameters(model)
    assert params["model.layers.1.mlp.down_proj.gate.weight"].grad.abs().max() > 0
    assert params["model.layers.0.self_attn.q_proj.update.b"].grad.abs().max() > 0
    assert params["model.layers.1.mlp.down_proj.update.b"].grad is None


@pytest.mark.parametrize("gate", ["static", "token"])
def test_frozen_gates_of_a_learning_adapter_can_be_recorded(tiny_llama, randomize, gate):
    model = _adapted(tiny_llama, randomize, gate)
    for layer in adapted_linears(model).values():
        layer.gate.requires_grad_(False)
    with record_gates(model) as record:
        model(_tokens())
    assert len(record.names) == 8


@pytest.mark.parametrize("inputs_need_grad", [False, True])
@pytest.mark.parametrize("gate", ["static", "token"])
def test_reentrant_checkpointing_is_refused(tiny_llama, randomize, gate, inputs_need_grad):
    model = _adapted(tiny_llama, randomize, gate).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if inputs_need_grad:
        model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match=r"8 layers .*reentrant"), record_gates(model):
        model(_tokens(), use_cache=False)
