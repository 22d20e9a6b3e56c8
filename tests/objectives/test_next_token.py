"""Entropy from the logit, sums instead of means, and a head that sees only what carries loss."""

import pytest
import torch
import torch.nn.functional as F
from model_families import FAMILIES, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.objectives.next_token import (
    gate_entropy,
    next_token_labels,
    summed_cross_entropy,
    summed_gate_entropy,
    target_positions_only,
)


@pytest.fixture(params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES, **FAMILIES[request.param])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()


def test_the_head_on_targets_alone_gives_the_loss_and_gradients_of_full_logits(family):
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (3, 9))
    labels = torch.where(torch.rand(3, 9) < 0.4, ids, IGNORE_INDEX)
    shifted = next_token_labels(labels)
    keep = shifted != IGNORE_INDEX
    with target_positions_only(family, keep):
        logits = family(input_ids=ids).logits
    full = family(input_ids=ids).logits
    assert logits.shape == (1, int(keep.sum()), 96)
    assert torch.allclose(logits[0], full[keep], rtol=0, atol=1e-12)

    parameters = [p for p in family.parameters() if p.requires_grad]
    ours = torch.autograd.grad(summed_cross_entropy(logits, shifted[keep]), parameters)
    reference = torch.autograd.grad(
        F.cross_entropy(
            full[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        ),
        parameters,
    )
    for mine, theirs in zip(ours, reference, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-10)


def test_the_hook_is_gone_afterwards(family):
    ids = torch.randint(3, 96, (1, 5))
    with pytest.raises(ZeroDivisionError), target_positions_only(family, torch.zeros(1, 5, dtype=torch.bool)):
        raise ZeroDivisionError
    assert family(input_ids=ids).logits.shape == (1, 5, 96)


def test_no_targets_is_a_loss_of_zero_with_a_gradient_of_zero(tiny_llama):
    model = tiny_llama()
    with target_positions_only(model, torch.zeros(2, 4, dtype=torch.bool)):
        logits = model(input_ids=torch.randint(0, 128, (2, 4))).logits
    loss = summed_cross_entropy(logits, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert float(loss) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_next_token_labels_by_hand():
    labels = torch.tensor([[IGNORE_INDEX, 7, 8], [5, IGNORE_INDEX, 6]])
    assert next_token_labels(labels).tolist() == [[7, 8, IGNORE_INDEX], [IGNORE_INDEX, 6, IGNORE_INDEX]]


def test_entropy_and_its_gradient_from_the_definition():
    z = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    g = torch.sigmoid(z.detach())
    assert torch.allclose(gate_entropy(z), -(g * g.log() + (1 - g) * (1 - g).log()), atol=1e-14)
    (gradient,) = torch.autograd.grad(gate_entropy(z).sum(), z)
    assert torch.allclose(gradient, -z.detach() * g * (1 - g), atol=1e-14)


@pytest.mark.parametrize("sign", [1, -1])
def test_entropy_keeps_its_digits_where_the_gate_is_decided(sign):
    """The form in z instead of |z| is off by 100 % at z = 20 in fp32."""
    z = torch.tensor([12.0, 20.0, 40.0, 80.0])
    wide = z.double()
    exact = torch.log1p(torch.exp(-wide)) + wide * torch.exp(-wide) / (1 + torch.exp(-wide))
    assert torch.allclose(gate_entropy(sign * z).double(), exact, rtol=1e-5, atol=0)
    assert torch.isfinite(gate_entropy(torch.tensor([1e4, -1e4]))).all()


def test_entropy_is_largest_half_open():
    assert float(gate_entropy(torch.zeros(()))) == pytest.approx(0.6931472)


def test_padding_has_no_entropy():
    z = torch.randn(2, 2, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    by_hand = sum(gate_entropy(z[layer, row, t]) for layer in (0, 1) for row, t in ((0, 0), (0, 1), (1, 0)))
    assert float(summed_gate_entropy(z, mask)) == pytest.approx(float(by_hand))


def test_cross_entropy_of_bf16_logits_is_computed_in_fp32():
    logits = torch.randn(1, 5, 7).bfloat16()
    loss = summed_cross_entropy(logits, torch.arange(5))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, -F.log_softmax(logits[0].float(), -1)[range(5), range(5)].sum())
