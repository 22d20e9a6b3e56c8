"""What lives between forward and backward: of size out x in, the frozen weight alone; no copy of the input."""

import gc
import itertools

import pytest
import torch
from torch import nn

from gatera_lightning import AdapterConfig
from gatera_lightning.adapters.kernels.gate_logit import token_logit
from gatera_lightning.adapters.kernels.hadamard import add_gated_hadamard
from gatera_lightning.adapters.layer import AdaptedLinear

IN, OUT, RANK, BATCH, TOKENS = 37, 41, 3, 2, 5  # no product of the others is a multiple of OUT * IN
METHODS = list(itertools.product(("lora", "dora", "hira"), ("none", "static", "token")))
DTYPES = [torch.float32, torch.bfloat16]


def _adapted(update, gate, dtype, dropout=0.5):
    torch.manual_seed(0)
    layer = AdaptedLinear(
        nn.Linear(IN, OUT).to(dtype), AdapterConfig(update=update, gate=gate, rank=RANK, dropout=dropout)
    )
    return layer, torch.randn(BATCH, TOKENS, IN).to(dtype).requires_grad_()


def _saved_by(run):
    """The result of ``run()`` and every tensor that autograd keeps for its backward."""
    saved = []

    def keep(tensor):
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return run(), saved


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


def _is_dense(tensor):
    """Of the weight's size, in either orientation, or larger than everything a token leaves behind."""
    return (
        tensor.numel() >= OUT * IN or tensor.untyped_storage().nbytes() // tensor.element_size() >= OUT * IN
    )


def _made_by(run):
    """The result of ``run()`` and every dense tensor it made that is still alive, wherever it is kept."""
    gc.collect()
    gc.freeze()  # what is alive now is not listed below
    try:
        result = run()
        alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    finally:
        gc.unfreeze()
    return result, [tensor for tensor in alive if _is_dense(tensor)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_autograd_saves_no_dense_tensor_but_the_frozen_weight(randomise, update, gate, dtype, dropout):
    layer, x = _adapted(update, gate, dtype, dropout)
    randomise(layer)
    y, saved = _saved_by(lambda: layer(x))
    dense = [tensor for tensor in saved if _is_dense(tensor)]
    assert dense  # the frozen weight: dx needs it
    assert {_storage(tensor) for tensor in dense} == {_storage(layer.base.weight)}
    y.sum().backward()
    assert all(p.grad is not None for p in layer.adapter_params().values())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_no_dense_tensor_is_alive_after_the_forward(randomise, update, gate, dtype, dropout):
    layer, x = _adapted(update, gate, dtype, dropout)
    randomise(layer)
    y, dense = _made_by(lambda: layer(x))
    assert {_storage(tensor) for tensor in dense} <= {_storage(layer.base.weight)}
    assert y.requires_grad


def test_the_scan_of_live_tensors_sees_what_a_function_keeps():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.dense = torch.zeros(OUT, IN)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy

    y, dense = _made_by(lambda: Keeps.apply(torch.ones(2, requires_grad=True)))
    assert y.requires_grad
    assert len(dense) == 1


@pytest.mark.parametrize(("update", "gate"), METHODS)
def test_no_float32_copy_of_a_bfloat16_input_is_saved(randomise, update, gate):
    layer, x = _adapted(update, gate, torch.bfloat16)
    randomise(layer)
    _, saved = _saved_by(lambda: layer(x))
    assert not [
        tensor.shape for tensor in saved if tensor.numel() >= x.numel() and tensor.dtype == torch.float32
    ]


def test_the_token_logit_saves_the_input_itself():
    x = torch.randn(BATCH, TOKENS, IN).bfloat16().requires_grad_()
    w, b = torch.randn(IN, requires_grad=True), torch.zeros(1, requires_grad=True)
    z, saved = _saved_by(lambda: token_logit(x, w, b))
    assert z.dtype == torch.float32
    assert {_storage(tensor) for tensor in saved} == {_storage(x), _storage(w)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_hadamard_update_saves_its_arguments_alone(dtype):
    x = torch.randn(BATCH, TOKENS, IN).to(dtype).requires_grad_()
    weight, g = torch.randn(OUT, IN).to(dtype), torch.rand(BATCH, TOKENS, requires_grad=True)
    a, b = torch.randn(RANK, IN, requires_grad=True), torch.randn(OUT, RANK, requires_grad=True)
    y = torch.zeros(BATCH, TOKENS, OUT, dtype=dtype)
    _, saved = _saved_by(lambda: add_gated_hadamard(y, x, weight, a, b, g))
    assert {_storage(tensor) for tensor in saved} == {_storage(tensor) for tensor in (x, weight, a, b, g)}
