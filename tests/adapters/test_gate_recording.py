"""Recorded gate logits: their layers, their lifetime, and their gradient under gradient checkpointing."""

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
    """Return the mean of -(g log g + (1 - g) log(1 - g)) with g = sigmoid(z)."""
    return -(torch.sigmoid(z) * F.logsigmoid(z) + torch.sigmoid(-z) * F.logsigmoid(-z)).mean()


@pytest.mark.parametrize("gate", ["static", "token"])
def test_record_holds_logits_of_all_layers_in_order(tiny_llama, randomize, gate):
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
    assert all(torch.equal(layer, z) for layer, z in zip(stacked, record.logits, strict=True))


def test_recording_does_not_change_output(tiny_llama, randomize):
    model, tokens = _adapted(tiny_llama, randomize), _tokens()
    expected = model(tokens).logits
    with record_gates(model):
        assert torch.equal(model(tokens).logits, expected)


def test_recording_ends_with_block(tiny_llama, randomize):
    model = _adapted(tiny_llama, randomize)
    model(_tokens())
    with record_gates(model) as record:
        assert record.names == []
        model(_tokens())
        model(_tokens())
        assert len(record.names) == 16
    model(_tokens())
    assert len(record.names) == len(record.logits) == 16
    assert all(layer.gate_listener is None for layer in adapted_linears(model).values())
    with record_gates(model) as second:
        model(_tokens())
    assert (len(record.names), len(second.names)) == (16, 8)


def test_recordings_cannot_be_nested(tiny_llama, randomize):
    model = _adapted(tiny_llama, randomize)
    with record_gates(model) as record:
        with pytest.raises(RuntimeError, match="nested"), record_gates(model):
            pass
        model(_tokens())
    assert len(record.names) == 8  # the outer recording continues
    with record_gates(model) as record:
        model(_tokens())
    assert len(record.names) == 8


def test_error_ends_recording(tiny_llama, randomize):
    model = _adapted(tiny_llama, randomize)
    with pytest.raises(KeyError), record_gates(model):
        raise KeyError("the step failed")
    assert all(layer.gate_listener is None for layer in adapted_linears(model).values())


def test_two_models_are_recorded_separately(tiny_llama, randomize):
    first, second = _adapted(tiny_llama, randomize), _adapted(tiny_llama, randomize, "static")
    with record_gates(first) as record, record_gates(second) as other:
        first(_tokens())
        assert (len(record.names), len(other.names)) == (8, 0)


def test_model_without_gates_has_empty_record(tiny_llama, randomize):
    for model in (_adapted(tiny_llama, randomize, "none"), tiny_llama()):
        with record_gates(model) as record:
            model(_tokens())
        assert record.names == record.logits == []
        assert record.stacked(torch.ones(2, 5)) is None


def test_stacked_restores_batch_shape():
    flat = torch.arange(6.0)
    record = GateRecord(["a", "b"], [flat, flat.reshape(2, 3) + 10])
    assert torch.equal(record.stacked(torch.ones(2, 3)), torch.stack([flat, flat + 10]).reshape(2, 2, 3))


def test_stacked_rejects_layer_with_other_tokens():
    record = GateRecord(["a", "experts.0"], [torch.zeros(2, 3), torch.zeros(4)])
    with pytest.raises(ValueError, match=r"gate of experts\.0 saw 4 tokens of a batch of \(2, 3\)"):
        record.stacked(torch.ones(2, 3))


@pytest.mark.parametrize("gate", ["static", "token"])
def test_logits_have_no_graph_without_gradients(tiny_llama, randomize, gate):
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
    """Return the gradients of the loss with entropy term, the record, and how often the first layer ran."""
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
def test_checkpointing_preserves_entropy_gradient(tiny_llama, randomize, gate, update):
    plain = _adapted(tiny_llama, randomize, gate, "float64", update).train()
    checkpointed = _adapted(tiny_llama, randomize, gate, "float64", update).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    expected, _, once = _step(plain)
    actual, record, twice = _step(checkpointed)
    assert (once, twice) == (1, 2)
    assert record.names == list(adapted_linears(checkpointed))  # recomputed in backward but recorded once
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_entropy_gradient_reaches_gates_and_earlier_layers(tiny_llama, randomize):
    model = _adapted(tiny_llama, randomize, "token", "float64")
    with record_gates(model) as record:
        model(_tokens())
    _entropy(record.logits[-1]).backward()
    params = adapter_parameters(model)
    assert params["model.layers.1.mlp.down_proj.gate.weight"].grad.abs().max() > 0
    assert params["model.layers.0.self_attn.q_proj.update.b"].grad.abs().max() > 0
    assert params["model.layers.1.mlp.down_proj.update.b"].grad is None


@pytest.mark.parametrize("gate", ["static", "token"])
def test_frozen_gates_can_be_recorded(tiny_llama, randomize, gate):
    model = _adapted(tiny_llama, randomize, gate)
    for layer in adapted_linears(model).values():
        layer.gate.requires_grad_(False)
    with record_gates(model) as record:
        model(_tokens())
    assert len(record.names) == 8


@pytest.mark.parametrize("inputs_need_grad", [False, True])
@pytest.mark.parametrize("gate", ["static", "token"])
def test_reentrant_checkpointing_is_rejected(tiny_llama, randomize, gate, inputs_need_grad):
    model = _adapted(tiny_llama, randomize, gate).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if inputs_need_grad:
        model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match=r"8 layers .*reentrant"), record_gates(model):
        model(_tokens(), use_cache=False)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "logit_of",
    [
        lambda weight: weight[0].expand(2, 4),
        lambda weight: weight.view(2, 4),
        lambda weight: weight.detach().view(4, 2).t(),
        lambda weight: weight.unsqueeze(0)[:, :4],
        lambda weight: weight,
    ],
    ids=["expanded", "reshaped", "detached", "sliced", "parameter itself"],
)
def test_recorded_logits_share_no_memory_with_parameters(logit_of, mode):
    """Sharded training frees a layer's parameters as soon as the layer has run."""
    weight = torch.nn.Parameter(torch.arange(8.0))
    record = GateRecord()
    with mode():
        logit = logit_of(weight)
        record.add("layer", logit)
    expected = logit.detach().clone()
    weight.data.fill_(-1)
    assert torch.equal(record.logits[0], expected)
    assert record.logits[0].requires_grad == (logit.requires_grad and mode is torch.enable_grad)
