"""Small adapted layers and their dense reference: output and all gradients in float64 by autograd."""

import itertools

import torch
from torch import nn

from gatera_lightning import AdapterConfig
from gatera_lightning.adapters.gates import GATES
from gatera_lightning.adapters.layer import AdaptedLinear

UPDATE_NAMES, GATE_NAMES = ("lora", "dora", "hira"), ("none", "static", "token")
EVEN_UPDATES = ("abba", "block_hira")  # whose ranks and sizes must be even
ALL_UPDATES = (*UPDATE_NAMES, *EVEN_UPDATES)
METHODS = list(itertools.product(UPDATE_NAMES, GATE_NAMES))
TRAINED_METHODS = [
    *METHODS,
    ("abba", "none"),
    ("abba", "token"),
    ("block_hira", "token"),
    ("lora", "threshold"),
    ("hira", "threshold"),
]
"""Methods without random draws that runs on several ranks are compared with: every update and every gate."""
ALL_METHODS = list(itertools.product(ALL_UPDATES, GATE_NAMES))
SIZES = [(7, 13, 3), (13, 5, 5)]  # in, out, rank
# backbone dtype, adapter dtype, tolerance relative to the largest element
DTYPES = {
    "fp32": (torch.float32, "float32", 1e-5),
    "fp64": (torch.float64, "float64", 1e-12),
    "bf16": (torch.bfloat16, "float32", 3e-2),
}


def gate_config(kind, **settings):
    """Settings of a gate; those that the kind lacks are dropped."""
    config = GATES[kind]
    return config(**{name: value for name, value in settings.items() if hasattr(config(), name)})


def adapted_layer(update, gate, size=SIZES[0], *, bias=True, dtype=torch.float32, **settings):
    """Create an adapted layer with B = 0; the same arguments give the same values."""
    size_in, size_out, rank = (n + n % 2 for n in size) if update in EVEN_UPDATES else size
    torch.manual_seed(0)
    base = nn.Linear(size_in, size_out, bias=bias).to(dtype)
    if "hira" not in update:
        settings.setdefault("alpha", 2.5 * rank)
    config = AdapterConfig(update=update, gate=gate, rank=rank, **settings)
    return AdaptedLinear(base, config, torch.Generator().manual_seed(1))


def layer_inputs(layer, batch=(2, 3), *, requires_grad=True):
    """Draw an input (*batch, in) and an output gradient (*batch, out) in the dtype of the frozen weight."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*batch, layer.in_features, generator=generator).to(layer.weight.dtype)
    dy = torch.randn(*batch, layer.out_features, generator=generator).to(layer.weight.dtype)
    return x.requires_grad_(requires_grad), dy


def reference_update(update, x, dropped, w0, p, scale):
    """Compute u(x) (..., out) from the parameters p by name, with dropout applied to x as ``dropped``."""
    if update == "block_hira":  # a grid of 2 × 2 blocks
        rows, columns, half = (n // 2 for n in (*w0.shape, len(p["update.a"])))
        a, b = p["update.a"].split(half), p["update.b"].split(rows)
        blocks = [
            [b[i][:, j * half :][:, :half] @ a[i][:, j * columns :][:, :columns] for j in range(2)]
            for i in range(2)
        ]
        return dropped @ (w0 * torch.cat([torch.cat(row, dim=1) for row in blocks])).t()
    ba = p["update.b"] @ p["update.a"]
    if update == "abba":
        return scale * dropped @ ((p["update.weight_b"] @ p["update.weight_a"]) * ba).t()
    if update == "lora":
        return scale * dropped @ ba.t()
    if update == "hira":
        return dropped @ (w0 * ba).t()
    ratio = p["update.magnitude"] / torch.linalg.vector_norm(w0 + scale * ba, dim=1).detach()
    return ratio * (x @ w0.t() + scale * dropped @ ba.t()) - x @ w0.t()


def _reference_gate(gate, x, p):
    one = torch.ones(x.shape[:-1], dtype=x.dtype)
    if gate == "none":
        return one
    return torch.sigmoid(p["gate.bias"] * one + (x @ p["gate.weight"] if gate == "token" else 0))


def reference(layer, x, dy, mask=None):
    """Compute output and gradients by name in float64; ``mask`` is the dropout mask of the input."""
    update, gate = layer.config.update, layer.config.gate.kind
    p = {n: v.detach().double().requires_grad_() for n, v in layer.adapter_params().items()}
    w0, x = layer.base.weight.double(), x.detach().double().requires_grad_()
    dropped = x if mask is None else x * mask
    u = reference_update(update, x, dropped, w0, p, layer.config.scale)
    y = x @ w0.t() + _reference_gate(gate, x, p).unsqueeze(-1) * u
    if layer.base.bias is not None:
        y = y + layer.base.bias.double()
    grads = torch.autograd.grad(y, [x, *p.values()], dy.double())
    return y.detach(), dict(zip(["x", *p], grads, strict=True))


def actual(layer, x, dy):
    """Compute the layer's own output and gradients by name."""
    y = layer(x)
    y.backward(dy)
    grads = {n: v.grad for n, v in layer.adapter_params().items()}
    return y.detach(), grads | ({"x": x.grad} if x.requires_grad else {})


def assert_close(name, found, expected, tol, size=None):
    """Assert that the largest error is within ``tol`` of the largest element, or of ``size``."""
    assert found.shape == expected.shape, name
    error, size = (found.double() - expected).abs().max().item(), size or expected.abs().max().item()
    assert size > 1e-3, f"{name}: the reference is all zero, so the comparison would prove nothing"
    assert error <= tol * size, f"{name}: off by {error:.2e}, and the largest element is {size:.2e}"


def assert_all_close(found, expected, tol):
    """Assert that outputs and all gradients agree."""
    assert_close("y", found[0], expected[0], tol)
    assert set(found[1]) == set(expected[1])
    # The bias gradient sums terms that may cancel, so the weight's gradient sets the scale for both.
    gate_size = max(
        [g.abs().max().item() for n, g in expected[1].items() if n.startswith("gate")], default=None
    )
    for name, gradient in expected[1].items():
        size = gate_size if name.startswith("gate") else None
        assert_close(f"d{name}", found[1][name], gradient, tol, size)
