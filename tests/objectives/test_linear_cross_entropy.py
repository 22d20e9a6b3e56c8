"""Loss and gradient without ever storing all logits, alone and inside a model's own head."""

import pytest
import torch
import torch.nn.functional as F
from model_families import FAMILIES, SIZES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning import AdapterConfig, adapter_parameters, inject_adapters
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.objectives.linear_cross_entropy import linear_cross_entropy, summed_loss_in_head
from gatera_lightning.objectives.next_token import head_only_at, shift_labels, summed_cross_entropy

N, WIDTH, VOCABULARY = 7, 5, 11
CHUNK = "gatera_lightning.objectives.linear_cross_entropy.LOGITS_PER_CHUNK"


@pytest.fixture(
    params=[1, 3 * VOCABULARY + 2, 1000], ids=["one position each", "chunks of 3, 3 and 1", "one chunk"]
)
def chunk_size(request, monkeypatch):
    monkeypatch.setattr(CHUNK, request.param)


def random_inputs(dtype, bias, n=N):
    torch.manual_seed(0)
    hidden = torch.randn(n, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    weight = 2 * torch.randn(VOCABULARY, WIDTH, dtype=torch.float64).to(dtype)
    drawn_bias = torch.randn(VOCABULARY, dtype=torch.float64).to(dtype) if bias else None
    return hidden, weight, drawn_bias, torch.arange(n)


def reference_loss(hidden, weight, bias, labels):
    """The definition."""
    p = torch.softmax(F.linear(hidden, weight, bias), -1)
    return -p[range(len(labels)), labels].log().sum()


@pytest.mark.usefixtures("chunk_size")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_loss_and_gradient_match_definition(bias):
    inputs = random_inputs(torch.float64, bias)
    loss, reference = linear_cross_entropy(*inputs), reference_loss(*inputs)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(reference.item(), rel=1e-14)
    ours, theirs = (torch.autograd.grad(0.3 * each, inputs[0])[0] for each in (loss, reference))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda hidden: linear_cross_entropy(hidden, *inputs[1:]), inputs[0])


@pytest.mark.usefixtures("chunk_size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_as_exact_as_autograd(dtype):
    """Compared with float64. The loss is in fp32; autograd's gradient needs all logits."""
    hidden, weight, bias, labels = random_inputs(dtype, True, n=VOCABULARY)
    wide = hidden.detach().double().requires_grad_()
    exact_loss = reference_loss(wide, weight.double(), bias.double(), labels)
    exact = torch.autograd.grad(exact_loss / 13, wide)[0]
    usual = summed_cross_entropy(F.linear(hidden, weight, bias)[None], labels)
    loss = linear_cross_entropy(hidden, weight, bias, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(usual.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(each / 13, hidden)[0] for each in (loss, usual))
    assert ours.dtype == dtype
    # One rounding more: the gradient is stored before the incoming gradient multiplies it.
    assert float((ours - exact).abs().max()) <= 2 * float((theirs - exact).abs().max())


def test_backward_does_not_round_incoming_gradient():
    """In bf16, 1/13 would be off by 0.3 %."""
    hidden, weight, _, labels = random_inputs(torch.bfloat16, False)
    full, part = (
        torch.autograd.grad(c * linear_cross_entropy(hidden, weight, None, labels), hidden)[0]
        for c in (1, 1 / 13)
    )
    assert torch.equal(part, (full.float() / 13).bfloat16())


def test_large_logits_do_not_overflow():
    hidden, weight, _, labels = random_inputs(torch.float32, False)
    loss = linear_cross_entropy(1e4 * hidden, weight, None, labels)
    reference = F.cross_entropy(1e4 * hidden @ weight.t(), labels, reduction="sum")
    assert loss.item() == pytest.approx(reference.item())
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_no_positions_give_zero_loss_and_gradient():
    hidden, weight, bias, labels = random_inputs(torch.float32, True, n=0)
    before = torch.randn(4, WIDTH, requires_grad=True)
    loss = linear_cross_entropy(before[torch.zeros(4, dtype=torch.bool)] + hidden, weight, bias, labels)
    loss.backward()
    assert float(loss) == 0
    assert not before.grad.any()


class LargestAllocation(TorchDispatchMode):
    """Records the largest storage that any operation creates, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_only_one_chunk_of_logits_is_allocated_and_none_saved():
    """2,048 positions with Llama 3's vocabulary in bf16, on the meta device."""
    saved = []
    with torch.device("meta"):
        hidden = torch.empty(2048, 64, dtype=torch.bfloat16, requires_grad=True)
        weight, labels = torch.empty(128256, 64, dtype=torch.bfloat16), torch.empty(2048, dtype=torch.long)
    with (
        LargestAllocation() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        linear_cross_entropy(hidden, weight, None, labels).backward()
    assert 0.9 * 4 * 2**25 < seen.largest <= 4 * 2**25 < 4 * 2048 * 128256
    assert [tensor.shape for tensor in saved] == [hidden.shape]


# --- inside a model ---


def adapted_family(name):
    """A tiny model of a family, with random adapter values."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES, **FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    inject_adapters(
        model, AdapterConfig(rank=2, target_modules=["o_proj", "down_proj"], adapter_dtype="float64")
    )
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(std=0.1)
    return model.train()


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_loss_in_head_matches_full_logits(name, checkpointing, monkeypatch):
    monkeypatch.setattr(CHUNK, 4 * SIZES["vocab_size"])
    model = adapted_family(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 96, (3, 9))
    labels = torch.where(torch.rand(3, 9) < 0.6, ids, IGNORE_INDEX)
    shifted = shift_labels(labels)
    positions = shifted != IGNORE_INDEX
    with head_only_at(model, positions):
        loss = summed_loss_in_head(
            model, shifted[positions], lambda: model(input_ids=ids, use_cache=False).logits
        )
    full = model(input_ids=ids, use_cache=False).logits
    reference = F.cross_entropy(
        full[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    assert loss.shape == ()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-13)
    parameters = list(adapter_parameters(model).values())
    ours, theirs = (torch.autograd.grad(each, parameters) for each in (loss, reference))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_summed_loss_in_head_restores_head_after_error():
    model = adapted_family("llama")

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        summed_loss_in_head(model, torch.tensor([5]), fail)
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, SIZES["vocab_size"])
