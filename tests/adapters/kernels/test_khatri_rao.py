"""ABBA's autograd function: gradients of plain operations, and what it saves for the backward pass."""

import pytest
import torch
from adapted_layers import adapted_layer, layer_inputs
from saved_tensors import saved_by, storage

from gatera_lightning.adapters.kernels.khatri_rao import khatri_rao_factors, khatri_rao_update


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_are_those_of_plain_operations(gated):
    """r₁ and r₂ differ, and so do all other sizes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, a1, b1, a2, b2 = draw(2, 3, 7), draw(2, 7), draw(5, 2), draw(4, 7), draw(5, 4)
    g = draw(2, 3) if gated else None
    inputs = [x, a1, b1, a2, b2, *([g] if gated else [])]
    dense = x @ ((b1 @ a1) * (b2 @ a2)).t() * 0.7 * (g.unsqueeze(-1) if gated else 1)
    found = khatri_rao_update(x, a1, b1, a2, b2, scale=0.7, g=g)
    torch.testing.assert_close(found, dense)
    dy = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    for own, expected in zip(
        torch.autograd.grad(found, inputs, dy), torch.autograd.grad(dense, inputs, dy), strict=True
    ):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["none", "token"])
def test_factors_are_not_saved(randomize, gate, dtype):
    layer = randomize(adapted_layer("abba", gate, (64, 48, 32), dtype=dtype))
    x, _ = layer_inputs(layer, (1, 3))
    _, saved = saved_by(lambda: layer(x))
    own = {storage(tensor) for tensor in (x, *layer.parameters())}
    sizes = {storage(t): t.untyped_storage().nbytes() for t in saved if storage(t) not in own}
    products = sum(
        factor.nbytes
        for factor in khatri_rao_factors(
            *(
                p.detach()
                for p in (layer.update.weight_a, layer.update.weight_b, layer.update.a, layer.update.b)
            )
        )
    )
    assert sum(sizes.values()) < products / 8  # A′x of three tokens and the gates
