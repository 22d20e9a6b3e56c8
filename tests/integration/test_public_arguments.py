"""Public functions answer arguments of a wrong type or value with a sentence that names the argument."""

import pytest
import torch

import gatera_lightning as gl


def ids(*shape):
    return torch.ones(shape, dtype=torch.long)


def batch(**changes):
    return {name: ids(1, 3) for name in ("input_ids", "attention_mask", "labels")} | changes


def enter(context):
    with context:
        pass


def module(**settings):
    configs = {
        "backbone": gl.BackboneConfig(),
        "adapter": gl.AdapterConfig(),
        "optimizer": gl.OptimizerConfig(),
    }
    return gl.GateRAModule(**configs | settings)


MODEL_FUNCTIONS = {
    "inject_adapters": lambda model: gl.inject_adapters(model, gl.AdapterConfig()),
    "adapter_parameters": gl.adapter_parameters,
    "save_adapter": lambda model: gl.save_adapter(model, "folder"),
    "load_adapter": lambda model: gl.load_adapter(model, "folder"),
    "merge_adapter": gl.merge_adapter,
    "prepared_for_inference": lambda model: enter(gl.prepared_for_inference(model)),
    "record_gates": lambda model: enter(gl.record_gates(model)),
    "capture_gates": lambda model: enter(gl.capture_gates(model)),
}


@pytest.mark.parametrize("name", MODEL_FUNCTIONS)
@pytest.mark.parametrize("value", [None, {}, "meta-llama/Llama-3.2-1B", torch.nn.Linear], ids=repr)
def test_model_of_wrong_type_is_named(name, value):
    with pytest.raises(TypeError, match=rf"^{name}: model is .*; accepted: a Module$"):
        MODEL_FUNCTIONS[name](value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: gl.inject_adapters(m, None),
            "inject_adapters: config is None; accepted: an AdapterConfig",
        ),
        (lambda m: gl.inject_adapters(m, {"rank": 2}), "inject_adapters: config is {'rank': 2}; accepted"),
        (lambda m: gl.inject_adapters(m, gl.AdapterConfig), "config is AdapterConfig itself; accepted"),
        (
            lambda m: gl.inject_adapters(m, gl.AdapterConfig(), 0),
            "generator is 0; accepted: a Generator, or null",
        ),
        (lambda m: gl.save_adapter(m, None), "save_adapter: folder is None; accepted: text, or a Path"),
        (
            lambda m: gl.save_adapter(m, "x", template=3),
            "save_adapter: template is 3; accepted: text, or null",
        ),
        (
            lambda m: gl.save_adapter(m, "x", backbone={}),
            "save_adapter: backbone is {}; accepted: text, or null",
        ),
        (lambda m: gl.load_adapter(m, 3), "load_adapter: folder is 3; accepted: text, or a Path"),
        (
            lambda m: enter(gl.prepared_for_inference(m, skip_below="x")),
            "skip_below is 'x'; accepted: a finite",
        ),
        (lambda m: enter(gl.prepared_for_inference(m, skip_below=2)), "skip_below: 2; accepted"),
        (
            lambda m: enter(gl.prepared_for_inference(m, merge_above=float("nan"))),
            "merge_above is nan; accepted",
        ),
        (
            lambda m: gl.training_loss(m, None),
            "training_loss: batch is a NoneType; accepted: a mapping of tensors",
        ),
        (lambda m: gl.training_loss(m, ids(1, 3)), "training_loss: batch is a Tensor; accepted: a mapping"),
        (
            lambda m: gl.training_loss(m, batch(labels=[[1]])),
            r"batch\['labels'\] is a list; accepted: a tensor",
        ),
        (
            lambda m: gl.training_loss(m, batch(input_ids=torch.ones(1, 3))),
            r"has torch.float32; accepted: token ids",
        ),
        (
            lambda m: gl.training_loss(m, batch(labels=ids(1, 2))),
            r"labels \(1, 2\); accepted: three tensors of one",
        ),
        (
            lambda m: gl.training_loss(m, {n: ids(3) for n in batch()}),
            r"accepted: three tensors of one shape",
        ),
        (
            lambda m: gl.training_loss(m, batch(), objectives=["x"]),
            "'x' among objectives; accepted: instances",
        ),
        (lambda m: gl.training_loss(m, batch(), objectives=[]), "the objectives returned no terms"),
        (lambda m: module(backbone=None), "GateRAModule: backbone is None; accepted: a BackboneConfig"),
        (lambda m: module(backbone="gpt2"), "GateRAModule: backbone is 'gpt2'; accepted: a BackboneConfig"),
        (lambda m: module(adapter={}), "GateRAModule: adapter is {}; accepted: an AdapterConfig"),
        (
            lambda m: module(optimizer={"lr": 1}),
            "GateRAModule: optimizer is {'lr': 1}; accepted: an OptimizerConfig",
        ),
        (lambda m: module(decoding={}), "GateRAModule: decoding is {}; accepted: a DecodingConfig, or null"),
        (lambda m: module(objectives=[3]), r"objectives is \[3\]; accepted: a list of Objective, or null"),
        (lambda m: module(warm_start=3), "GateRAModule: warm_start is 3; accepted: text, or null"),
        (lambda m: module(lr=3), "GateRAModule has no argument lr"),
        (
            lambda m: gl.register_update(dict),
            "register_update: <class 'dict'>; accepted: a subclass of Update",
        ),
        (lambda m: gl.register_gate(None), "register_gate: None; accepted: a subclass of GateConfig"),
        (lambda m: gl.Term(1.0, 3), "Term: total is 1.0; accepted: a scalar tensor"),
        (lambda m: gl.Term(torch.ones(()), 0), "Term: count is 0; accepted: a number above 0"),
        (lambda m: gl.inject_adaptors, "no attribute 'inject_adaptors'"),
    ],
)
def test_argument_of_wrong_type_or_value_is_named(tiny_llama, call, message):
    model = tiny_llama()
    gl.inject_adapters(model, gl.AdapterConfig(rank=2))
    with pytest.raises((TypeError, ValueError, AttributeError), match=message):
        call(model)
