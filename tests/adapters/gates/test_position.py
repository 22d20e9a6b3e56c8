"""Position gates: updates on the tokens of a mask, and the frozen model's own bits everywhere else."""

import pytest
import torch
from adapted_layers import ALL_UPDATES, EVEN_UPDATES, actual, adapted_layer, layer_inputs, reference_update
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning import (
    AdapterConfig,
    ConfigError,
    inject_adapters,
    merge_adapter,
    position_mask,
    prepared_for_inference,
    record_gates,
)
from gatera_lightning.adapters.gates import PositionGateConfig

IDS = torch.arange(24).reshape(3, 8)
DRAFT = torch.zeros(3, 8, dtype=torch.bool)
DRAFT[0, 5:] = DRAFT[1] = True  # a mixed sequence, one of draft tokens only, one of clean tokens only


def adapted(tiny_llama, randomize, update="lora", **settings):
    model = tiny_llama()
    config = AdapterConfig(
        update=update, gate="position", rank=4 if update in EVEN_UPDATES else 3, **settings
    )
    inject_adapters(model, config, torch.Generator().manual_seed(0))
    return randomize(model).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update", ALL_UPDATES)
def test_clean_tokens_are_the_untouched_models_bit_for_bit(tiny_llama, randomize, update, dtype):
    model, untouched = adapted(tiny_llama, randomize, update).to(dtype), tiny_llama(dtype).eval()
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            expected = untouched(IDS).logits
            with position_mask(model, DRAFT):
                found = model(input_ids=IDS).logits
            assert torch.equal(found[~DRAFT], expected[~DRAFT])
            assert bool((found[DRAFT] != expected[DRAFT]).any(-1).all())
            with position_mask(model, torch.zeros(8, dtype=torch.bool)):
                assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("update", ALL_UPDATES)
def test_gradients_equal_dense_reference(randomize, update):
    layer = randomize(
        adapted_layer(update, PositionGateConfig(), (12, 10, 3), dtype=torch.float64, adapter_dtype="float64")
    ).train()
    x, dy = layer_inputs(layer, (3, 8))
    with position_mask(layer, DRAFT):
        y, grads = actual(layer, x, dy)
    p = {name: value.detach().requires_grad_() for name, value in layer.adapter_params().items()}
    w0, x = layer.base.weight, x.detach().requires_grad_()
    u = reference_update(update, x, x, w0, p, layer.config.scale)
    expected = x @ w0.t() + layer.base.bias + DRAFT.unsqueeze(-1) * u
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for name, gradient in zip(["x", *p], torch.autograd.grad(expected, [x, *p.values()], dy), strict=True):
        torch.testing.assert_close(grads[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_clean_tokens_cost_and_reach_nothing(randomize):
    layer = randomize(adapted_layer("lora", PositionGateConfig(), (12, 10, 3)))
    x, _ = layer_inputs(layer, (3, 8), requires_grad=False)
    with torch.no_grad(), position_mask(layer, DRAFT), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 24 * 2 * 12 * 10 + 11 * 2 * 3 * (12 + 10)  # 11 draft tokens
    layer.update.b.data[0, 0] = float("nan")  # 0 · NaN would be NaN
    with torch.no_grad(), position_mask(layer, DRAFT):
        assert torch.equal(layer(x)[~DRAFT], layer.base(x)[~DRAFT])


@pytest.mark.parametrize("thresholds", [{}, {"skip_below": 0.1, "merge_above": 0.9}], ids=["exact", "fast"])
def test_decoding_keeps_the_bits(tiny_llama, randomize, thresholds):
    model, untouched = adapted(tiny_llama, randomize, "hira"), tiny_llama().eval()
    with torch.no_grad(), prepared_for_inference(model, **thresholds):
        with position_mask(model, DRAFT):
            found = model(IDS).logits
        assert torch.equal(found[~DRAFT], untouched(IDS).logits[~DRAFT])


def test_gradient_checkpointing_inside_the_block(tiny_llama, randomize):
    losses = []
    for checkpointing in (False, True):
        model = adapted(tiny_llama, randomize, "hira").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with position_mask(model, DRAFT):
            model(IDS).logits.square().mean().backward()
        losses.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *losses))
    with position_mask(model, DRAFT):
        loss = model(IDS).logits.square().mean()
    with pytest.raises(RuntimeError, match="With gradient checkpointing, the backward pass too"):
        loss.backward()


def test_recorded_gates_are_the_mask(tiny_llama, randomize):
    model = adapted(tiny_llama, randomize, target_modules=["q_proj"])
    with record_gates(model) as gates, position_mask(model, DRAFT):
        model(IDS)
    z = gates.stacked(DRAFT)
    assert z.shape == (2, 3, 8)
    assert torch.equal(z > 0, DRAFT.expand(2, 3, 8))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(3, 8), r"mask is torch.float32 \(3, 8\); accepted: bool"),
        (torch.zeros(3, 8, 1, dtype=torch.bool), r"mask is torch.bool \(3, 8, 1\); accepted: bool"),
        (torch.zeros(2, 8, dtype=torch.bool), r"the mask is \(2, 8\), and the tokens are \(3, 8\)"),
        (torch.zeros(3, dtype=torch.bool), r"the mask is \(3,\), and the tokens are \(3, 8\)"),
    ],
    ids=["float", "three_dimensions", "other_batch", "batch_in_place_of_tokens"],
)
def test_mask_that_does_not_fit_is_refused_before_computing(tiny_llama, randomize, mask, message):
    model = adapted(tiny_llama, randomize)
    ran = []
    model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=message), position_mask(model, mask):
        model(IDS)
    assert not ran
    with pytest.raises(RuntimeError, match="a position gate needs a mask"):  # nothing is left of it
        model(IDS)


def test_layer_with_other_tokens_is_refused(randomize):
    layer = randomize(adapted_layer("lora", PositionGateConfig()))
    x, _ = layer_inputs(layer, (4, 6), requires_grad=False)  # as many tokens as the mask has
    message = r"the mask is \(3, 8\), and the tokens are \(4, 6\)"
    with pytest.raises(ValueError, match=message), position_mask(layer, DRAFT):
        layer(x)
    with position_mask(layer, DRAFT):
        assert layer(x.flatten(0, 1)).shape == (24, layer.out_features)


def test_one_mask_serves_one_forward_pass(tiny_llama, randomize):
    model = adapted(tiny_llama, randomize)
    with position_mask(model, DRAFT):
        model(IDS)
        with pytest.raises(RuntimeError, match="belongs to a forward pass that has run"):
            model(IDS)
        with pytest.raises(RuntimeError, match="already active"), position_mask(model, DRAFT):
            pass


def test_model_without_position_gates_is_refused(tiny_llama):
    with (
        pytest.raises(ValueError, match="the model has no position gate"),
        position_mask(tiny_llama(), DRAFT),
    ):
        pass


def test_merging_is_refused(tiny_llama, randomize):
    with pytest.raises(ValueError, match="has a 'position' gate, whose value differs between tokens"):
        merge_adapter(adapted(tiny_llama, randomize))


def test_second_adapter_is_refused(tiny_llama, randomize):
    """One layer has one update and one gate; PEFT's layers can have several adapters."""
    with pytest.raises(ConfigError, match="the model is already adapted"):
        inject_adapters(adapted(tiny_llama, randomize), AdapterConfig(gate="token"))
