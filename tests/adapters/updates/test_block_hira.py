"""Block-wise HiRA: its grid of low-rank blocks, and the sizes and ranks that it refuses."""

import pytest
import torch
from adapted_layers import actual, adapted_layer, layer_inputs
from torch import nn

from gatera_lightning import AdapterConfig, ConfigError, inject_adapters

SHAPES = {"three_blocks": (9, 15, 6, 3), "one_block": (7, 13, 3, 1), "blocks_of_one_row": (10, 5, 5, 5)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def layer(request, randomize):
    size_in, size_out, rank, blocks = request.param
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size_in, size_out).double())
    settings = {"update": "block_hira", "gate": "none", "rank": rank, "blocks": blocks}
    config = AdapterConfig(**settings, adapter_dtype="float64", target_modules=["0"])
    inject_adapters(model, config, torch.Generator().manual_seed(0))
    return randomize(model)[0]


def dense(layer, a, b):
    """P, block by block: rows i of B times columns j of A, each with the ranks of their own block."""
    n, (out, in_), rank = layer.update.blocks, layer.weight.shape, len(a)
    rows, columns, own = out // n, in_ // n, rank // n
    p = torch.zeros(out, in_, dtype=a.dtype)
    for i in range(n):
        for j in range(n):
            b_ij = b[i * rows : (i + 1) * rows, j * own : (j + 1) * own]
            a_ij = a[i * own : (i + 1) * own, j * columns : (j + 1) * columns]
            p[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = b_ij @ a_ij
    return p


@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_equal_dense_grid(layer, training):
    x, dy = layer_inputs(layer.train(training), (2, 3))
    y, grads = actual(layer, x, dy)
    a, b = (p.detach().requires_grad_() for p in (layer.update.a, layer.update.b))
    x = x.detach().requires_grad_()
    expected = x @ (layer.weight + layer.weight * dense(layer, a, b)).t() + layer.base.bias
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(expected, [x, a, b], dy)
    for name, gradient in zip(("x", "update.a", "update.b"), found, strict=True):
        torch.testing.assert_close(grads[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_merged_weight_has_the_rank_of_all_blocks(layer):
    p = dense(layer, layer.update.a.detach(), layer.update.b.detach())
    torch.testing.assert_close(layer.update.delta_weight(layer.weight), layer.weight * p, rtol=0, atol=1e-12)
    n, rank = layer.update.blocks, len(layer.update.a)
    assert torch.linalg.matrix_rank(p) == min(*p.shape, n * rank)
    assert sum(f.numel() for f in layer.update.parameters()) == rank * sum(p.shape)  # as HiRA of this rank


def test_default_is_two_blocks():
    assert adapted_layer("block_hira", "none").update.blocks == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rank": 5, "blocks": 3},
            "adapter.rank: 5, but update 'block_hira' has blocks 3; accepted: a multiple",
        ),
        ({"rank": 3}, "adapter.rank: 3, but update 'block_hira' has blocks 2; accepted: a multiple"),
        (
            {"rank": 6, "rank_pattern": {"0": 4}, "blocks": 3},
            "adapter.rank_pattern.0: 4, but update 'block_hira' has blocks 3",
        ),
        ({"rank": 4, "blocks": 2}, "adapter.blocks: 2, and 0 \\(9 -> 15\\): 2 does not divide both sides"),
        ({"rank": 4, "blocks": 0}, "adapter.blocks: 0; accepted: an integer of at least 1"),
        ({"rank": 4, "blocks": 2, "update": "hira"}, "adapter.blocks: 2, but update 'hira' has no blocks"),
    ],
)
def test_ranks_and_sizes_that_do_not_divide_are_refused(settings, message):
    model = nn.Sequential(nn.Linear(9, 15))
    config = AdapterConfig(**{"update": "block_hira", "gate": "none", "target_modules": ["0"]} | settings)
    with pytest.raises(ConfigError, match=message):
        inject_adapters(model, config)
    assert type(model[0]) is nn.Linear
