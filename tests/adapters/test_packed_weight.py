"""Adapted layers over a packed frozen weight: the same as over its dense copy, and never dense in between."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from adapted_layers import METHODS, actual, assert_all_close, layer_inputs, reference
from packed_layers import ALL_STORAGES, pack_weight, packed_adapted_layer
from saved_tensors import saved_by, tensors_made_by
from torch import nn

from gatera_lightning import AdapterConfig, inject_adapters, merge_adapter
from gatera_lightning.adapters.fingerprint import weight_fingerprint
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.adapters.inference import prepared_bytes, prepared_for_inference
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.adapters.packed_weight import PackedWeight

DTYPES = {
    "fp64": (torch.float64, "float64", 1e-12),
    "fp32": (torch.float32, "float32", 1e-5),
    "bf16": (torch.bfloat16, "float32", 3e-2),
}


@pytest.fixture(scope="module", autouse=True)
def thaw():
    """Let the collector see again what the tests have frozen."""
    yield
    gc.unfreeze()


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("update", "gate"), METHODS)
@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_output_and_gradients_are_those_of_the_dense_formula(randomize, storage, update, gate, precision):
    dtype, adapter_dtype, tolerance = DTYPES[precision]
    layer = packed_adapted_layer(storage, update, gate, dtype=dtype, adapter_dtype=adapter_dtype)
    randomize(layer)
    x, _ = layer_inputs(layer)
    # The gate's gradient Σ dy·u is then a sum of squares, in which nothing cancels.
    dy = layer.update.delta(x, layer.base).detach()
    assert_all_close(actual(layer, x, dy), reference(layer, x, dy), tolerance)
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("gate", ["open", "closed", "mixed"])
@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_saturated_gates_compute_what_they_compute_over_the_dense_weight(randomize, storage, gate):
    thresholds = {"open": (0.0, 0.01), "closed": (0.99, 1.0), "mixed": (0.45, 0.55)}[gate]
    config = TokenGateConfig(skip_below=thresholds[0], merge_above=thresholds[1])
    layer = packed_adapted_layer(storage, "hira", config, dtype=torch.float64, adapter_dtype="float64")
    randomize(layer)
    over_dense = copy.deepcopy(layer)
    over_dense.base.weight = nn.Parameter(layer.base.weight.dense(), requires_grad=False)
    x, dy = layer_inputs(layer, (4, 9))
    found, expected = actual(layer, x, dy), actual(over_dense, x.detach().clone().requires_grad_(), dy)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("update", "gate"), METHODS)
@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_autograd_saves_the_packed_weight_only(randomize, storage, update, gate, dtype):
    layer = randomize(packed_adapted_layer(storage, update, gate, size=(128, 96, 3), dtype=dtype))
    x, _ = layer_inputs(layer, (2, 5))
    y, saved = saved_by(lambda: layer(x))
    assert any(isinstance(tensor, PackedWeight) for tensor in saved)  # dx needs the frozen weight
    plain = [tensor for tensor in saved if not isinstance(tensor, PackedWeight)]
    assert not [tensor.shape for tensor in plain if tensor.untyped_storage().nbytes() >= 128 * 96]
    y.sum().backward()
    assert all(p.grad is not None for p in layer.adapter_params().values())


@pytest.mark.parametrize(("update", "gate"), METHODS)
@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_no_dense_copy_is_alive_after_a_pass(randomize, storage, update, gate):
    layer = randomize(packed_adapted_layer(storage, update, gate, size=(128, 96, 3)))
    x, dy = layer_inputs(layer, (2, 5))

    def shapes(tensors):
        return [tensor.shape for tensor in tensors if tensor.numel() >= 128 * 96]

    y, made = tensors_made_by(lambda: layer(x))
    assert shapes(made) == []
    _, made = tensors_made_by(lambda: y.backward(dy))
    assert shapes(made) == []


@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_autocast_casts_as_for_a_dense_weight(storage):
    linear = pack_weight(nn.Linear(64, 48), storage)
    plain = nn.Linear(64, 48)
    plain.load_state_dict({"weight": linear.weight.dense(), "bias": linear.bias})
    x = torch.randn(3, 64, requires_grad=True)
    gradients = []
    for layer in (linear, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        gradients.append((y, torch.autograd.grad(y.sum(), x)[0]))
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_copies_and_casts_stay_packed(storage):
    linear = pack_weight(nn.Linear(64, 48), storage)
    weight = linear.weight
    for other in (
        copy.deepcopy(linear).weight,
        weight.clone(),
        weight.detach(),
        weight.data,
        weight.to("cpu"),
    ):
        assert isinstance(other, PackedWeight)
        assert torch.equal(other.dense(), weight.dense())
    cast = copy.deepcopy(linear).to(torch.float64)
    assert isinstance(cast.weight, PackedWeight)
    assert cast.weight.dtype == torch.float64
    assert torch.equal(
        cast(torch.ones(64).double()),
        F.linear(torch.ones(64).double(), weight.dense(torch.float64), cast.bias),
    )


def test_operations_see_the_dense_weight():
    weight = pack_weight(nn.Linear(64, 48), "int8").weight
    assert torch.equal(weight * 2, weight.dense() * 2)
    assert torch.equal(weight.t(), weight.dense().t())
    assert torch.equal(torch.nn.Embedding.from_pretrained(weight)(torch.tensor([3])), weight.dense()[3:4])


@pytest.mark.parametrize(
    "write", [lambda w: w.mul_(2), lambda w: w.copy_(torch.ones(48, 64)), lambda w: w.zero_()]
)
def test_packed_weight_cannot_be_written_to(write):
    weight = pack_weight(nn.Linear(64, 48), "int8").weight
    before = weight.dense()
    with pytest.raises(RuntimeError, match="would write to a weight that is stored as int8"), torch.no_grad():
        write(weight)
    assert torch.equal(weight.dense(), before)


def test_input_of_another_dtype_is_rejected_as_for_a_dense_weight():
    linear = pack_weight(nn.Linear(64, 48), "int8")
    with pytest.raises(RuntimeError, match=r"got torch\.float64"):
        linear(torch.ones(64).double())


def test_second_derivatives_are_rejected():
    linear, x = pack_weight(nn.Linear(64, 48), "int8"), torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)


def test_fingerprint_is_that_of_the_weight_before_it_was_packed():
    dense = nn.Linear(64, 48).weight
    packed = PackedWeight.pack(dense, "int8", weight_fingerprint(dense))
    for same in (
        packed,
        copy.deepcopy(packed),
        packed.to(torch.bfloat16),
        nn.Parameter(packed, requires_grad=False),
    ):
        assert weight_fingerprint(same) == weight_fingerprint(dense)


@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_fingerprint_of_a_weight_that_was_only_seen_packed_is_of_its_dense_values(storage):
    packed = pack_weight(nn.Linear(64, 48), storage).weight
    assert weight_fingerprint(packed) == weight_fingerprint(packed.dense())
    assert weight_fingerprint(packed.to(torch.bfloat16)) == weight_fingerprint(packed)


@pytest.mark.parametrize("thresholds", [{}, {"skip_below": 0.4, "merge_above": 0.6}], ids=["exact", "fast"])
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_prepared_inference_is_that_over_the_dense_weight(randomize, update, gate, thresholds):
    models = []
    for packed in (True, False):
        torch.manual_seed(0)
        linear = pack_weight(nn.Linear(64, 48), "int8")
        if not packed:
            linear.weight = nn.Parameter(linear.weight.dense())
        model = nn.Sequential()
        model.add_module("q_proj", linear)
        inject_adapters(
            model,
            AdapterConfig(update=update, gate=gate, rank=3, target_modules=["q_proj"]),
            torch.Generator().manual_seed(0),
        )
        models.append(randomize(model).eval())
    x = torch.randn(7, 64)
    outputs = []
    for model in models:
        with torch.no_grad(), prepared_for_inference(model, **thresholds):
            outputs.append((model(x), model(x[:1])))
    torch.testing.assert_close(*outputs)
    assert prepared_bytes(models[0], with_thresholds=bool(thresholds)) == prepared_bytes(
        models[1], with_thresholds=bool(thresholds)
    )


def test_merging_into_a_packed_weight_is_refused(randomize):
    model = nn.Sequential()
    model.add_module("q_proj", pack_weight(nn.Linear(64, 48), "int8"))
    inject_adapters(model, AdapterConfig(update="lora", gate="none", rank=3, target_modules=["q_proj"]))
    randomize(model)
    with pytest.raises(ValueError, match=r"q_proj is stored as int8, .*dequantize_linear_layers"):
        merge_adapter(model)
    assert isinstance(adapted_linears(model)["q_proj"].base.weight, PackedWeight)
