"""Recomputing elementwise outputs saves memory and keeps every bit of losses and gradients."""

import gc
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from model_families import FAMILIES, SIZES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning import (
    AdapterConfig,
    BackboneConfig,
    GateRAModule,
    OptimizerConfig,
    adapter_parameters,
    inject_adapters,
)
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.backbone.recomputation import MAX_OPERATIONS, recompute_elementwise
from gatera_lightning.cost_model.live_bytes import LiveBytes
from gatera_lightning.objectives import next_token

TOKENS, WIDTH, WIDE = 7, 8, 64


def of_family(name, dtype, **adapter):
    """A tiny adapted model whose adapter is not zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES, **FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    adapter = {"rank": 2, "adapter_dtype": "float64" if dtype == torch.float64 else "float32"} | adapter
    inject_adapters(model, AdapterConfig(**adapter))
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(std=0.1)
    return model.train()


def step(model, around):
    """Loss and gradients, and the bytes alive between forward and backward pass."""
    ids = torch.arange(2 * 9).view(2, 9) + 3
    parameters = list(adapter_parameters(model).values())
    torch.manual_seed(1)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        with around:
            logits = model(input_ids=ids, use_cache=False).logits
        loss = logits.float().square().mean()
        saved = live.now
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [loss.detach(), *gradients], saved


def assert_bit_equal_with_less_memory(model, share):
    """Bit-identical results with at most ``share`` of the bytes."""
    (expected, all_saved), (found, saved) = step(model, nullcontext()), step(model, recompute_elementwise())
    for one, other in zip(found, expected, strict=True):
        assert (one is None and other is None) or (one.dtype == other.dtype and torch.equal(one, other))
    assert saved <= share * all_saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_model_families(name, dtype):
    """Phi fuses gate and up, Gemma uses GELU and norms that scale by 1 + w, Cohere subtracts the mean."""
    targets = ["gate_up_proj", "down_proj"] if name == "phi3" else ["q_proj", "up_proj", "down_proj"]
    assert_bit_equal_with_less_memory(of_family(name, dtype, target_modules=targets), 0.9)


@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
@pytest.mark.parametrize("gate", ["none", "static", "token"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_updates_and_gates(update, gate, dropout):
    assert_bit_equal_with_less_memory(
        of_family("llama", torch.bfloat16, update=update, gate=gate, dropout=dropout), 0.85
    )


@pytest.mark.parametrize("thresholds", [(0.45, 1.0), (0.0, 0.55), (0.5, 0.5)], ids=str)
def test_gate_thresholds(thresholds):
    skip, merge = thresholds
    assert_bit_equal_with_less_memory(
        of_family("llama", torch.float32, gate=TokenGateConfig(skip_below=skip, merge_above=merge)), 0.8
    )


def test_adapters_outside_the_mlp():
    """A frozen down_proj saves no input, and the activation is recomputed all the same."""
    assert_bit_equal_with_less_memory(of_family("llama", torch.float32, target_modules=["q_proj"]), 0.9)


def test_autocast():
    model = of_family("llama", torch.float32)

    cast = torch.autocast("cpu", torch.bfloat16)

    @contextmanager
    def cast_and_recomputed():
        with cast, recompute_elementwise():
            yield

    expected, all_saved = step(model, cast)
    found, saved = step(model, cast_and_recomputed())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert saved < all_saved


def test_checkpointed_layer_saves_as_little_as_before():
    model = of_family("llama", torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_bit_equal_with_less_memory(model, 1.0)
    plain = of_family("llama", torch.float32)
    assert step(model, recompute_elementwise())[1] < 0.5 * step(plain, recompute_elementwise())[1]


# --- one gated MLP, one norm ---


@pytest.fixture
def gate_and_up():
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    return (x, *(torch.randn(WIDE, WIDTH) for _ in range(2)), torch.randn(WIDE, requires_grad=True))


def mlp(between=lambda gate, up: F.silu(gate) * up):
    """A gated MLP with a trained down projection (1, WIDE), as a function of the fixture's tensors."""
    return lambda x, gate, up, down: (
        (F.linear(between(F.linear(x, gate), F.linear(x, up)), down[None])).square().sum()
    )


def run(function, tensors, around=recompute_elementwise):
    """Result and gradients, and the bytes alive in between."""
    with LiveBytes(list(tensors)) as live:
        with around():
            out = function(*tensors)
        saved = live.now
        gradients = torch.autograd.grad(out, [t for t in tensors if t.requires_grad])
    return [out.detach(), *gradients], saved


def compare(function, tensors):
    """Bytes alive without and with recomputation; the results must be bit-identical."""
    (expected, all_saved), (found, saved) = run(function, tensors, nullcontext), run(function, tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    return all_saved, saved


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gated_mlp_saves_gate_and_up_only(gate_and_up, device):
    tensors = [t.detach().to(device).requires_grad_(t.requires_grad) for t in gate_and_up]
    saved = [run(mlp(), tensors, around)[1] for around in (nullcontext, recompute_elementwise)]
    wide = 4 * TOKENS * WIDE
    rest = 4 * (TOKENS + 1)  # the output, and its sum
    assert saved == [4 * wide + rest, 2 * wide + rest]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norm_saves_its_input_and_one_number_per_row(dtype):
    """A bf16 input is saved in bf16, not in fp32."""
    torch.manual_seed(0)
    x, weight, w = (
        torch.randn(TOKENS, WIDE),
        torch.randn(WIDE).to(dtype),
        torch.randn(WIDE, dtype=dtype, requires_grad=True),
    )
    x = x.to(dtype).requires_grad_()

    def normed(x, weight, w):
        wide = (x * 1.0).float()
        return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)) @ w

    all_saved, saved = compare(lambda *tensors: normed(*tensors).square().sum(), (x, weight, w))
    numbers = TOKENS * WIDE
    rest = dtype.itemsize * (TOKENS + 1) + 4 * TOKENS
    assert all_saved == (4 + dtype.itemsize) * numbers + rest
    assert saved == dtype.itemsize * numbers + rest


class Operations(TorchDispatchMode):
    """Counts how often each operation runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_each_output_is_recomputed_once_per_backward_pass(gate_and_up):
    """Three operations use the product, one as a view; the product and its gradient use the activation."""
    many = mlp(
        lambda gate, up: (product := F.silu(gate) * up) + product.exp() * product.view(-1, WIDE).sin()[None]
    )
    counts = []
    for around in (nullcontext, recompute_elementwise):
        with around():
            out = many(*gate_and_up)
        with Operations() as operations:
            torch.autograd.grad(out, gate_and_up[0])
        counts.append(operations.counts)
    more = counts[1] - counts[0]
    assert {name: n for name, n in more.items() if name not in ("detach", "as_strided")} == {
        "silu": 1,
        "mul": 1,
    }
    compare(many, gate_and_up)


def test_backward_passes_leave_nothing_allocated(gate_and_up):
    """A second backward pass gives the same result, and deleting the graph frees everything."""
    with LiveBytes(list(gate_and_up)) as live:
        with recompute_elementwise():
            out = mlp(lambda gate, up: (F.silu(gate) * up).exp())(*gate_and_up)  # exp saves its own output
        saved = live.now
        first = torch.autograd.grad(out, gate_and_up[0], retain_graph=True)[0].clone()
        second = torch.autograd.grad(out, gate_and_up[0], retain_graph=True)[0]
        assert torch.equal(first, second)
        del first, second
        assert live.now == saved
        gc.disable()  # there must be no cycle that only gc finds
        try:
            del out
            assert live.now == 0
        finally:
            gc.enable()


# --- similar operations ---


def changed_without_autograd(change):
    """A product that is written to without autograd before an operation saves it."""

    def between(gate, up):
        product = F.silu(gate) * up
        with torch.no_grad():
            change(product)
        return product

    return between


SIMILAR = {
    "scaled": lambda gate, up: 0.5 * (F.silu(gate) * up),
    "scaled before": lambda gate, up: (F.silu(gate) * 3) * up,
    "scaled in place": lambda gate, up: (F.silu(gate) * up).mul_(0.5),
    "scaled in place by a tensor": lambda gate, up: (F.silu(gate) * up).mul_(gate),
    "scaled without a graph": changed_without_autograd(lambda product: product.mul_(0.5)),
    "a row set without a graph": changed_without_autograd(lambda product: product[:, 0].zero_()),
    "clamped": lambda gate, up: (F.silu(gate) * up).clamp(max=0.5),
    "added to": lambda gate, up: (F.silu(gate) * up).add_(1),
    "swapped": lambda gate, up: gate * F.silu(up),
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "tanh gelu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "quick gelu": lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
    "in place": lambda gate, up: F.silu(gate.add(1), inplace=True) * up,
    "itself": lambda gate, up: (product := gate * up) * product,
    "transposed": lambda gate, up: (F.silu(gate) * up).transpose(0, 1).contiguous(),
    "by column": lambda gate, up: F.silu(gate.mT.contiguous().mT) * up,
    "in double": lambda gate, up: (F.silu(gate).double() * up).float(),
    "detached": lambda gate, up: F.silu(gate).detach() * up,
    "a slice": lambda gate, up: F.pad((F.silu(gate) * up)[..., 1:], (1, 0)).exp(),
}


@pytest.mark.parametrize("between", SIMILAR.values(), ids=SIMILAR)
def test_similar_operations_are_bit_equal(gate_and_up, between):
    all_saved, saved = compare(mlp(between), gate_and_up)
    assert saved <= all_saved


def test_product_written_to_is_saved(gate_and_up):
    all_saved, saved = compare(mlp(changed_without_autograd(lambda product: product.mul_(0.5))), gate_and_up)
    assert all_saved - saved == 4 * TOKENS * WIDE  # the activation


def test_long_chain_saves_every_fifth_output(gate_and_up):
    """A recurrence of more steps than Python's recursion limit."""

    def chain(gate, up):
        by = 1 + up / 1000
        for _ in range(1000):
            gate = gate * by
        return gate

    all_saved, saved = compare(mlp(chain), gate_and_up)
    assert saved / all_saved == pytest.approx(1 / (MAX_OPERATIONS + 1), rel=0.02)


def test_saved_tensor_written_to_raises(gate_and_up):
    """As autograd does on its own."""
    x, gate, up, down = gate_and_up
    for change in (lambda g: g.add_(1), lambda g: gate.add_(1)):
        with recompute_elementwise():
            g = F.linear(x, gate)
            out = F.linear(F.silu(g) * F.linear(x, up), down[None])
        with torch.no_grad():
            change(g)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_other_hooks_inside_take_precedence(gate_and_up):
    seen = []

    def between(gate, up):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.append(t.shape) or t.detach(), lambda t: t
        ):
            return F.silu(gate) * up

    compare(mlp(between), gate_and_up)
    assert len(seen) == 6
    compare(lambda *tensors: checkpoint(mlp(), *tensors, use_reentrant=False), gate_and_up)


@pytest.mark.parametrize("off", ["no_grad", "compiling"])
def test_hooks_are_not_used_without_graph_or_while_compiling(gate_and_up, monkeypatch, off):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: off == "compiling")
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", None)  # calling it would fail
    with torch.set_grad_enabled(off != "no_grad"), recompute_elementwise():
        mlp()(*gate_and_up)


# --- the module ---


def test_training_loss_saves_less_and_is_bit_equal(tiny_backbone, monkeypatch):
    settings = BackboneConfig(id=str(tiny_backbone), dtype="float32")
    module = GateRAModule(backbone=settings, adapter=AdapterConfig(rank=2), optimizer=OptimizerConfig())
    module.configure_model()
    ids = torch.arange(2 * 16).view(2, 16) + 3
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    runs = []
    for around in (recompute_elementwise, nullcontext):
        monkeypatch.setattr(next_token, "recompute_elementwise", around)
        with LiveBytes([*module.model.parameters(), *module.model.buffers()]) as live:
            loss = next_token.summed_next_token_loss(module.model, batch)
            saved = live.now
            gradients = torch.autograd.grad(loss, list(adapter_parameters(module.model).values()))
        runs.append((saved, [loss.detach(), *gradients]))
        del loss, gradients
    (saved, found), (all_saved, expected) = runs
    assert saved < 0.9 * all_saved
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "last", [F.silu, lambda h: h * h.sigmoid(), lambda h: F.gelu(h).double()], ids=["silu", "product", "cast"]
)
def test_output_of_checkpointed_layer_is_saved(last):
    """Its operations saved their inputs inside the checkpoint, where they can be unpacked only once."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 3, requires_grad=True) for _ in range(3)]

    def gradients(block):
        h = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
        with block:
            for weight in weights:
                h = checkpoint(lambda h, weight: last(h.float() @ weight), h, weight, use_reentrant=False)
            loss = (h * h).sum()
        return torch.autograd.grad(loss, weights)

    for recomputed, plain in zip(gradients(recompute_elementwise()), gradients(nullcontext()), strict=True):
        assert torch.equal(recomputed, plain)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.preserve_format], ids=str)
def test_view_of_copy_with_another_memory_format(format):
    x = torch.randn(3, 4, requires_grad=True)

    def gradient(block):
        with block:
            h = F.silu(x.t()).to(torch.float64, memory_format=format)
            loss = h.reshape(-1).sin().sum() + h.flatten()[3:9].view(2, 3).cos().sum()
        return torch.autograd.grad(loss, x)[0]

    assert torch.equal(gradient(recompute_elementwise()), gradient(nullcontext()))


def test_other_hooks_outside_switch_recomputation_off():
    x, packed = torch.randn(4, requires_grad=True), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t),
        recompute_elementwise(),
    ):
        F.silu(x).sin()
    assert len(packed) == 2


def test_chain_deeper_than_the_recursion_limit():
    h = torch.ones(2, requires_grad=True)
    with recompute_elementwise():
        for _ in range(3000):
            h = h * 1.0
        h.sin().sum().backward()


def _silu_product(a, b):
    return F.silu(a) * b


def _product(a, b):
    return a * b


def _gelu_product(a, b):
    return F.gelu(a) * b


@pytest.mark.parametrize("first", [_silu_product, _product, _gelu_product])
@pytest.mark.parametrize(
    "second",
    [
        lambda x, y, w: checkpoint(_silu_product, w, w, use_reentrant=False),
        lambda x, y, w: checkpoint(_silu_product, x, y, use_reentrant=False),  # the inputs of the first one
        lambda x, y, w: checkpoint(_product, y, x, use_reentrant=False),
        lambda x, y, w: checkpoint(torch.matmul, w, w, use_reentrant=False),
        lambda x, y, w: _SavesItsInput.apply(x),
    ],
    ids=["leaves", "same inputs", "swapped inputs", "matmul", "custom function"],
)
def test_checkpoint_that_ends_in_a_product_before_another_one(first, second):
    """What the second one saves must not count as saved by the first one's last node."""

    def loss(x, y, w):
        z = checkpoint(first, x, y, use_reentrant=False)
        other = second(x, y, w)
        return (z @ w).sum() + other.sum()

    compare(
        loss,
        [torch.randn(4, 4, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)],
    )


class _SavesItsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * ctx.saved_tensors[0] * dy
