"""Loss and gradient of all logits at once, without ever having them; and which models let the head compute the loss."""

import pytest
import torch
import torch.nn.functional as F
from model_families import FAMILIES, SIZES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning import AdapterConfig, adapter_parameters, inject_adapters
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.objectives.linear_cross_entropy import (
    cross_entropy_in_head,
    linear_cross_entropy,
    returns_what_its_head_does,
)
from gatera_lightning.objectives.next_token import (
    next_token_labels,
    summed_cross_entropy,
    target_positions_only,
)

N, WIDTH, VOCABULARY = 7, 5, 11
PLAIN = {"llama", "qwen2", "phi3"}


@pytest.fixture(
    params=[1, 3 * VOCABULARY + 2, 1000], ids=["a position each", "chunks of 3, 3 and 1", "one chunk"]
)
def chunked(request, monkeypatch):
    monkeypatch.setattr("gatera_lightning.objectives.linear_cross_entropy.LOGITS_AT_A_TIME", request.param)


def drawn(dtype, bias, n=N):
    torch.manual_seed(0)
    hidden = torch.randn(n, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    weight = 2 * torch.randn(VOCABULARY, WIDTH, dtype=torch.float64).to(dtype)
    return (
        hidden,
        weight,
        torch.randn(VOCABULARY, dtype=torch.float64).to(dtype) if bias else None,
        torch.arange(n),
    )


def by_definition(hidden, weight, bias, targets):
    p = torch.softmax(F.linear(hidden, weight, bias), -1)
    return -p[range(len(targets)), targets].log().sum()


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_loss_and_gradient_in_double_precision(bias):
    hidden, weight, b, targets = drawn(torch.float64, bias)
    loss, reference = (
        linear_cross_entropy(hidden, weight, b, targets),
        by_definition(hidden, weight, b, targets),
    )
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(reference.item(), rel=1e-14)
    ours, theirs = (torch.autograd.grad(0.3 * each, hidden)[0] for each in (loss, reference))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, weight, b, targets), hidden)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_that_of_autograd(dtype):
    """Compared with the same numbers in fp64: the loss in fp32, the gradient as far off as autograd's of all logits."""
    hidden, weight, bias, targets = drawn(dtype, True, n=VOCABULARY)
    wide = hidden.detach().double().requires_grad_()
    exact = torch.autograd.grad(by_definition(wide, weight.double(), bias.double(), targets) / 13, wide)[0]
    logits = F.linear(hidden, weight, bias)
    usual = summed_cross_entropy(logits[None], targets)
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(usual.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(each / 13, hidden)[0] for each in (loss, usual))
    assert ours.dtype == dtype
    # Of one rounding more: the gradient is kept for backward before the incoming one multiplies it.
    assert float((ours - exact).abs().max()) <= 2 * float((theirs - exact).abs().max())


def test_the_incoming_gradient_is_not_rounded_to_bf16():
    """1/13 would be off by 0.3 %."""
    hidden, weight, _, targets = drawn(torch.bfloat16, False)
    whole, part = (
        torch.autograd.grad(c * linear_cross_entropy(hidden, weight, None, targets), hidden)[0]
        for c in (1, 1 / 13)
    )
    assert torch.equal(part, (whole.float() / 13).bfloat16())


def test_large_logits_overflow_nowhere():
    hidden, weight, _, targets = drawn(torch.float32, False)
    loss = linear_cross_entropy(1e4 * hidden, weight, None, targets)
    assert loss.item() == pytest.approx(
        F.cross_entropy(1e4 * hidden @ weight.t(), targets, reduction="sum").item()
    )
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_no_targets_is_a_loss_of_zero_with_a_gradient():
    hidden, weight, bias, targets = drawn(torch.float32, True, n=0)
    before = torch.randn(4, WIDTH, requires_grad=True)
    loss = linear_cross_entropy(before[torch.zeros(4, dtype=torch.bool)] + hidden, weight, bias, targets)
    loss.backward()
    assert float(loss) == 0
    assert not before.grad.any()


class Allocations(TorchDispatchMode):
    """The largest storage that any operation made, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_nothing_larger_than_a_chunk_is_ever_made_and_nothing_of_a_vocabulary_is_kept():
    """2,048 targets of Llama 3's vocabulary in bf16, in shapes."""
    saved = []
    with torch.device("meta"):
        hidden = torch.empty(2048, 64, dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.empty(128256, 64, dtype=torch.bfloat16), torch.empty(2048, dtype=torch.long)
    with (
        Allocations() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        linear_cross_entropy(hidden, weight, None, targets).backward()
    assert 0.9 * 4 * 2**25 < seen.largest <= 4 * 2**25 < 4 * 2048 * 128256
    assert [tensor.shape for tensor in saved] == [hidden.shape]


# --- the model ---


def of_family(name, dtype=torch.float64, **settings):
    """A tiny model whose adapter does something."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES, **FAMILIES[name], **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    inject_adapters(
        model, AdapterConfig(rank=2, target_modules=["o_proj", "down_proj"], adapter_dtype="float64")
    )
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(std=0.1)
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_models_that_cap_or_scale_their_logits_are_told_from_those_that_do_not(name, dtype):
    assert returns_what_its_head_does(of_family(name, dtype)) == (name in PLAIN)


@pytest.mark.parametrize("name", sorted(PLAIN))
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_the_loss_in_the_head_is_that_of_full_logits(name, checkpointing, monkeypatch):
    monkeypatch.setattr(
        "gatera_lightning.objectives.linear_cross_entropy.LOGITS_AT_A_TIME", 4 * SIZES["vocab_size"]
    )
    model = of_family(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 96, (3, 9))
    labels = torch.where(torch.rand(3, 9) < 0.6, ids, IGNORE_INDEX)
    shifted = next_token_labels(labels)
    keep = shifted != IGNORE_INDEX
    with target_positions_only(model, keep), cross_entropy_in_head(model, shifted[keep]):
        loss = model(input_ids=ids, use_cache=False).logits
    full = model(input_ids=ids, use_cache=False).logits
    reference = F.cross_entropy(
        full[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    assert loss.shape == (1, 1, 1)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-13)
    parameters = list(adapter_parameters(model).values())
    for mine, theirs in zip(
        torch.autograd.grad(loss.squeeze(), parameters),
        torch.autograd.grad(reference, parameters),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_head_that_is_trained_is_not_plain():
    model = of_family("llama")
    model.lm_head.weight.requires_grad_(True)
    assert not returns_what_its_head_does(model)


def test_a_head_of_another_kind_is_not_plain():
    class Quantised(nn.Linear):
        pass

    model = of_family("llama")
    model.lm_head.__class__ = Quantised
    assert not returns_what_its_head_does(model)


def test_a_forward_that_somebody_else_replaced_is_left_alone():
    model = of_family("llama")
    model.lm_head.forward = own = lambda hidden: F.linear(hidden, model.lm_head.weight)
    assert not returns_what_its_head_does(model)
    assert model.lm_head.forward is own


@pytest.mark.parametrize(
    "after",
    [
        lambda logits: logits.mul_(0.5),
        lambda logits: logits * 1.0,
        lambda logits: torch.cat([logits, logits], -1),
    ],
    ids=["in place", "by one", "another shape"],
)
def test_whatever_is_done_to_logits_is_seen(after):
    model = of_family("llama")
    inner = model.forward

    def forward(**inputs):
        output = inner(**inputs)
        output.logits = after(output.logits)
        return output

    model.forward = forward
    assert not returns_what_its_head_does(model)


def test_a_hook_that_scales_what_the_head_returns_is_seen():
    model = of_family("llama")
    handle = model.lm_head.register_forward_hook(lambda _, args, out: 0.5 * out)
    assert not returns_what_its_head_does(model)
    handle.remove()
    assert returns_what_its_head_does(model)


def test_trying_leaves_no_trace():
    model = of_family("llama", attention_dropout=0.5)
    ids, seed = torch.tensor([[5, 6, 7]]), torch.get_rng_state()
    assert returns_what_its_head_does(model)
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(module.training for module in model.modules())
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=ids).logits.shape == (1, 3, SIZES["vocab_size"])
    with pytest.raises(ZeroDivisionError), cross_entropy_in_head(model, ids[0]):
        raise ZeroDivisionError
    assert "forward" not in vars(model.lm_head)


def test_the_trial_leaves_every_module_in_its_mode(tiny_llama):
    model = tiny_llama().train().requires_grad_(False)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert returns_what_its_head_does(model)
    assert [module.training for module in model.modules()] == modes
