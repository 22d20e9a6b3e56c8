"""What an adapted layer holds between forward and backward: no dense tensor but the frozen weight."""

import gc

import pytest
import torch
from adapted_layers import METHODS
from saved_tensors import saved_by, storage, tensors_made_by
from torch import nn

from gatera_lightning import AdapterConfig
from gatera_lightning.adapters.layer import AdaptedLinear

IN, OUT, RANK, BATCH, TOKENS = 37, 41, 3, 2, 5  # no product of the others is a multiple of OUT * IN
DTYPES = [torch.float32, torch.bfloat16]


def layer_and_input(update, gate, dtype, dropout=0.5):
    torch.manual_seed(0)
    layer = AdaptedLinear(
        nn.Linear(IN, OUT).to(dtype), AdapterConfig(update=update, gate=gate, rank=RANK, dropout=dropout)
    )
    return layer, torch.randn(BATCH, TOKENS, IN).to(dtype).requires_grad_()


def is_dense(tensor):
    """Return whether a tensor or its storage is as large as the weight."""
    return (
        tensor.numel() >= OUT * IN or tensor.untyped_storage().nbytes() // tensor.element_size() >= OUT * IN
    )


@pytest.fixture(scope="module", autouse=True)
def thaw():
    """Let the collector see again what the tests have frozen."""
    yield
    gc.unfreeze()


def dense_tensors_made_by(run):
    """Return the result of ``run()`` and the dense tensors it made that are still alive anywhere."""
    result, made = tensors_made_by(run)
    return result, [tensor for tensor in made if is_dense(tensor)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("update", "gate"), [*METHODS, ("hira", "threshold"), ("dora", "threshold")])
def test_autograd_saves_only_frozen_weight(randomize, update, gate, dtype, dropout):
    layer, x = layer_and_input(update, gate, dtype, dropout)
    randomize(layer)
    y, saved = saved_by(lambda: layer(x))
    dense = [tensor for tensor in saved if is_dense(tensor)]
    assert dense  # dx needs the frozen weight
    assert {storage(tensor) for tensor in dense} == {storage(layer.base.weight)}
    y.sum().backward()
    assert all(p.grad is not None for p in layer.adapter_params().values())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_no_dense_tensor_is_alive_after_forward(randomize, update, gate, dtype, dropout):
    layer, x = layer_and_input(update, gate, dtype, dropout)
    randomize(layer)
    y, dense = dense_tensors_made_by(lambda: layer(x))
    assert {storage(tensor) for tensor in dense} <= {storage(layer.base.weight)}
    assert y.requires_grad


def test_live_tensor_scan_finds_tensor_on_context():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.dense = torch.zeros(OUT, IN)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy

    y, dense = dense_tensors_made_by(lambda: Keeps.apply(torch.ones(2, requires_grad=True)))
    assert y.requires_grad
    assert len(dense) == 1


@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_no_float32_copy_of_bfloat16_input_is_saved(randomize, update, gate):
    layer, x = layer_and_input(update, gate, torch.bfloat16)
    randomize(layer)
    _, saved = saved_by(lambda: layer(x))
    assert not [
        tensor.shape for tensor in saved if tensor.numel() >= x.numel() and tensor.dtype == torch.float32
    ]
