"""Compiled decoder layers train as eager ones do, in few graphs for all shapes of batches."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from power_cut import ADAPTER, cut_off
from safetensors.torch import load_file
from tiny_backbone import tiny_args, tiny_module
from torch._dynamo.utils import counters

from gatera_lightning import AdapterConfig, ConfigError, adapter_parameters, inject_adapters, record_gates
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.backbone.compilation import compile_layers
from gatera_lightning.backbone.decoder_layers import decoder_layers
from gatera_lightning.cli.main import main


@pytest.fixture(autouse=True)
def _reset_compiler():
    """Compile from scratch in each test, and restore the compiler's settings."""
    dynamo, shapes = torch._dynamo.config, torch.fx.experimental._config
    torch._dynamo.reset()
    counters.clear()
    with dynamo.patch(recompile_limit=8, specialize_float=False), shapes.patch(use_duck_shape=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def backend(monkeypatch):
    """Choose a backend other than Inductor, which needs a C++ compiler and half a minute."""
    compiled = torch.compile
    return lambda name: monkeypatch.setattr(torch, "compile", partial(compiled, backend=name))


def adapted(tiny_llama, update="hira", gate="token", dtype=torch.float64, layers=2):
    model = tiny_llama(dtype, layers).train()
    dtype_name = str(dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(1)
    inject_adapters(
        model, AdapterConfig(update=update, gate=gate, rank=4, adapter_dtype=dtype_name), generator
    )
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def batch_of(model, rows, tokens, padding=2):
    """Embeddings that need a gradient, so that the first layer has the same graph as the others."""
    ids = torch.randint(0, 128, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[0, tokens - padding :] = 0
    return {"inputs_embeds": model.get_input_embeddings()(ids).requires_grad_(), "attention_mask": mask}


def step(model, batch):
    """The loss, every gradient, and the gates' logits."""
    model.zero_grad()
    with record_gates(model) as gates:
        logits = model(**batch, use_cache=False).logits
    z = gates.stacked(batch["attention_mask"])
    loss = logits.square().mean() + (0 if z is None else z.square().mean())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    return {
        "loss": loss,
        "x": batch["inputs_embeds"].grad,
        **gradients,
        **dict(zip(gates.names, gates.logits, strict=True)),
    }


def graphs():
    return counters["stats"]["unique_graphs"]


def saved_shapes(model, batch):
    """The shapes of the tensors that autograd saves, parameters excluded."""
    known = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    shapes = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch, use_cache=False)
    return set(shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "gate", "recomputed"),
    [
        ("hira", "token", False),
        ("hira", "token", True),
        ("hira", "none", False),
        pytest.param("lora", "none", False, marks=pytest.mark.stress),
        ("dora", "static", True),
    ],
)
def test_compiled_layers_have_the_same_losses_gradients_and_gates(
    tiny_llama, backend, update, gate, recomputed
):
    backend("aot_eager")
    plain, model = adapted(tiny_llama, update, gate), adapted(tiny_llama, update, gate)
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    names = list(model.state_dict()), list(adapter_parameters(model))
    compile_layers(model)
    assert (list(model.state_dict()), list(adapter_parameters(model))) == names
    for shape in ((3, 17), (2, 9)):
        expected, found = (step(each, batch_of(each, *shape)) for each in (plain, model))
        assert list(found) == list(expected)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    # A compiler sees that HiRA's backward pass recomputes W0 ⊙ BA, and would rather save it.
    frozen = {tuple(layer.weight.shape) for layer in adapted_linears(model).values()}
    assert not frozen & saved_shapes(model, batch_of(model, 3, 17))
    assert graphs() == 1
    assert not counters["graph_break"]


def test_one_graph_serves_all_layers_and_lengths(tiny_llama, backend):
    """Also if sizes are equal: rows and tokens of the first batch, tokens and channels of the second."""
    backend("eager")
    model = adapted(tiny_llama, layers=3)
    compile_layers(model)
    counted = []
    for shape in ((8, 8), (2, 32), (3, 17), (8, 40), (5, 9)):
        step(model, batch_of(model, *shape))
        counted.append(graphs())
    assert counted == [1] * 5


def test_evaluation_is_not_compiled(tiny_llama, backend):
    backend("eager")
    plain, model = adapted(tiny_llama).eval(), adapted(tiny_llama)
    compile_layers(model)
    with torch.no_grad():
        model(**batch_of(model, 2, 5))
    model.eval()
    found, expected = step(model, batch_of(model, 2, 5)), step(plain, batch_of(plain, 2, 5))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert graphs() == 0


def test_layer_that_cannot_be_compiled_is_a_config_error(tiny_llama, backend):
    backend("eager")
    model = adapted(tiny_llama)
    layer = decoder_layers(model)[0]
    original = layer.forward

    def with_graph_break(x, **kwargs):
        torch._dynamo.graph_break()
        return original(x, **kwargs)

    layer.forward = with_graph_break
    compile_layers(model)
    with pytest.raises(
        ConfigError, match=r"model.backbone.compile: true, and LlamaDecoderLayer cannot be compiled \(.*false"
    ):
        step(model, batch_of(model, 2, 5))


def test_compile_with_gate_thresholds_is_refused(tiny_backbone):
    module = tiny_module(tiny_backbone, gate=TokenGateConfig(skip_below=0.1))
    assert not module.problems()
    module.backbone.compile = True
    (problem,) = module.problems()
    assert problem.startswith(
        "model.backbone.compile: true, with adapter.gate.skip_below 0.1 and merge_above 1.0: "
    )
    assert problem.endswith("; accepted: false, or 0 and 1")


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler for Inductor"
)


@needs_compiler
@pytest.mark.slow
def test_inductor_trains_as_eager(tiny_llama):
    plain, model = (adapted(tiny_llama, dtype=torch.float32) for _ in range(2))
    compile_layers(model)
    for shape in ((3, 17), (2, 9)):
        expected, found = (step(each, batch_of(each, *shape)) for each in (plain, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert graphs() == 1


@pytest.fixture
def runs(tiny_backbone, tmp_path, monkeypatch):
    """Train on the command line in the folder ``runs/quickstart/NAME``; return the final adapter."""
    monkeypatch.chdir(tmp_path)
    args = [
        "fit",
        "--config",
        "quickstart.yaml",
        *tiny_args(tiny_backbone),
        "--checkpoint.every_n_steps",
        "1",
    ]

    def run(name, *more, command=main):
        command([*args, "--trainer.logger.init_args.version", name, *more])
        return load_file(Path("runs/quickstart", name, ADAPTER))

    return run


COMPILED = ("--model.backbone.compile", "true")


@pytest.mark.slow
def test_fit_compiles_layers(runs, backend):
    backend("eager")
    eager = runs("eager")
    assert graphs() == 0
    compiled = runs("compiled", *COMPILED)
    assert graphs() > 0
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.stress
def test_resumed_run_that_compiles_again_is_bit_equal(runs):
    uninterrupted = runs("uninterrupted", *COMPILED)
    torch._dynamo.reset()
    runs("cut", *COMPILED, command=partial(cut_off, step=2))
    torch._dynamo.reset()
    resumed = runs("resumed", *COMPILED, "--ckpt_path", "runs/quickstart/cut/checkpoints")
    torch.testing.assert_close(resumed, uninterrupted, rtol=0, atol=0)
