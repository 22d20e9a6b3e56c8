"""Tests of capture_gates: gates, positions and phases of forward passes and of generation."""

import numpy as np
import pytest
import torch
from torch import nn

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters
from gatera_lightning.gate_analysis.capture import GatedModule, capture_gates

PROMPTS = torch.tensor([[7, 3, 9, 4], [0, 0, 5, 6]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])  # left padding


@pytest.fixture
def model(tiny_llama):
    model = tiny_llama(initializer_range=0.2)
    inject_adapters(model, AdapterConfig(rank=3, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def expected_gates(model, forward):
    """Compute σ(w·x + b) from the input of every layer; (modules, batch, tokens) for each forward."""
    calls, inputs = [], {}
    layers = adapted_linears(model)
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
        for name, layer in layers.items()
    ]
    handles.append(
        model.register_forward_hook(
            lambda *_: calls.append(
                torch.stack(
                    [
                        torch.sigmoid(x @ layers[n].gate.weight + layers[n].gate.bias)
                        for n, x in inputs.items()
                    ]
                )
            )
        )
    )
    forward()
    for handle in handles:
        handle.remove()
    return [call.detach() for call in calls]


def test_capture_matches_gates_of_one_forward(model):
    with capture_gates(model) as captured:
        model(input_ids=PROMPTS, attention_mask=MASK)
    (call,) = captured.calls
    (expected,) = expected_gates(model, lambda: model(input_ids=PROMPTS, attention_mask=MASK))
    assert [module.path for module in captured.modules] == [
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert (call.gates - expected).abs().max() < 1e-6
    assert call.phase == "prefill"
    assert torch.equal(call.non_padding, MASK.bool())
    assert call.positions[1, 2:].tolist() == [0, 1]


@pytest.mark.parametrize("use_cache", [True, False])
def test_capture_matches_gates_of_generation(model, use_cache):
    def generate():
        return model.generate(
            input_ids=PROMPTS,
            attention_mask=MASK,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            use_cache=use_cache,
        )

    with capture_gates(model) as captured:
        ids = generate()
    expected = expected_gates(model, generate)
    assert len(captured.calls) == len(expected) == 3
    for call, gates in zip(captured.calls, expected, strict=True):
        assert (call.gates - gates).abs().max() < 1e-6
    if use_cache:
        assert [call.phase for call in captured.calls] == ["prefill", "decoding", "decoding"]
        assert [call.positions.tolist() for call in captured.calls[1:]] == [[[4], [2]], [[5], [3]]]
        row, gates = captured.row(1)
        assert row == [5, 6, *ids[1, 4:6].tolist()]  # the model never reads the last token
        assert gates.shape == (4, 4)
    else:
        assert [call.gates.shape[2] for call in captured.calls] == [4, 5, 6]


class RecurrentCache:
    """The cache of a recurrent model, which does not count tokens."""

    def get_seq_length(self):
        raise ValueError("`get_seq_length` can only be called on Attention layers")


class RecurrentModel(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, **_):
        return self.model(input_ids=input_ids)


@pytest.mark.parametrize(
    "cache_arguments",
    [{"past_key_values": RecurrentCache()}, {"past_key_values": (1, 2)}, {"state": [1, 2]}],
    ids=["recurrent cache", "tuple", "other argument name"],
)
def test_capture_counts_cached_tokens_by_mask_if_cache_cannot(model, cache_arguments):
    model = RecurrentModel(model)
    with capture_gates(model) as captured:
        model(input_ids=PROMPTS, attention_mask=MASK, **cache_arguments)
        model(
            input_ids=PROMPTS[:, :1],
            attention_mask=torch.cat([MASK, torch.ones(2, 1, dtype=torch.long)], 1),
            **cache_arguments,
        )
        model(input_ids=PROMPTS, **cache_arguments)
    assert [call.phase for call in captured.calls] == ["prefill", "decoding", "prefill"]
    assert captured.calls[1].positions.tolist() == [[4], [2]]
    with pytest.raises(ValueError, match="row 1: forward pass 2 does not continue forward pass 1"):
        captured.row(1)
    del captured.calls[2]
    assert captured.row(1)[0] == [5, 6, 0]


def test_columns_have_one_line_per_module_and_token(model):
    with capture_gates(model) as captured:
        model(input_ids=PROMPTS, attention_mask=MASK)
    table = captured.columns()
    assert {name: len(column) for name, column in table.items()} == dict.fromkeys(table, 4 * 6)
    selected = (table["layer"] == 1) & (table["module"] == "down_proj") & (table["row"] == 1)
    assert table["token_id"][selected].tolist() == [5, 6]
    assert table["position"][selected].tolist() == [0, 1]
    np.testing.assert_array_equal(table["gate"][selected], captured.calls[0].gates[3, 1, 2:])


def test_capture_leaves_outputs_unchanged_and_ends_with_block(model):
    expected = model(input_ids=PROMPTS, attention_mask=MASK).logits
    with capture_gates(model) as captured:
        assert torch.equal(model(input_ids=PROMPTS, attention_mask=MASK).logits, expected)
    model(input_ids=PROMPTS)
    assert len(captured.calls) == 1


def test_capture_of_embeddings_has_gates_but_no_token_ids(model):
    embedded = model.get_input_embeddings()(PROMPTS)
    with capture_gates(model) as captured:
        model(inputs_embeds=embedded, attention_mask=MASK)
    assert set(captured.columns()["token_id"]) == {-1}
    with pytest.raises(ValueError, match="token ids are unknown: a forward was run from embeddings"):
        captured.row(0)


def test_capture_is_empty_without_gates(tiny_llama):
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(update="lora", gate="none", rank=3))
    with capture_gates(model) as captured:
        model(input_ids=PROMPTS)
    assert captured.calls == []
    assert all(len(column) == 0 for column in captured.columns().values())


@pytest.mark.parametrize(
    ("path", "layer", "name"), [("model.layers.11.mlp.up_proj", 11, "up_proj"), ("lm_head", -1, "lm_head")]
)
def test_gated_module_parses_path(path, layer, name):
    module = GatedModule(path)
    assert (module.layer, module.projection) == (layer, name)


def _alone(model):
    with capture_gates(model) as captured:
        model(input_ids=PROMPTS, attention_mask=MASK)
    return captured


def _fails_in_head(model):
    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(input_ids=PROMPTS + 1)
    handle.remove()


@pytest.mark.parametrize(
    "before",
    [
        lambda model: model.model(PROMPTS + 1),
        lambda model: model.model(PROMPTS[:, :2]),
        lambda model: model.model.layers[0].mlp(torch.ones(2, 4, 32)),
        lambda model: adapted_linears(model)["model.layers.1.mlp.down_proj"](torch.ones(3, 48)),
        _fails_in_head,
    ],
    ids=["inner model", "other length", "one block", "one layer", "failed forward"],
)
def test_capture_does_not_mix_forward_passes(model, before):
    with torch.no_grad():
        expected = _alone(model)
        with capture_gates(model) as captured:
            before(model)
            model(input_ids=PROMPTS, attention_mask=MASK)
            before(model)
    (call,) = captured.calls
    assert captured.modules == expected.modules
    assert torch.equal(call.gates, expected.calls[0].gates)


@pytest.mark.parametrize("eos", [None, list(range(10, 60))], ids=["full length", "rows end"])
def test_generation_without_cache_counts_each_token_once(model, eos):
    def table(use_cache):
        torch.manual_seed(0)
        with capture_gates(model) as captured:
            model.generate(
                input_ids=PROMPTS,
                attention_mask=MASK,
                max_new_tokens=6,
                do_sample=True,
                eos_token_id=eos,
                pad_token_id=0,
                use_cache=use_cache,
            )
        return captured

    cached, uncached = table(True), table(False)
    expected, found = cached.columns(), uncached.columns()
    for name in expected:
        if name == "gate":
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], expected[name])
    for row in range(2):
        ids, gates = uncached.row(row)
        assert ids == cached.row(row)[0]
        np.testing.assert_allclose(gates, cached.row(row)[1], atol=1e-5)


def test_two_generations_without_cache_are_two_texts(model):
    with capture_gates(model) as captured:
        for _ in range(2):
            model.generate(
                input_ids=PROMPTS, attention_mask=MASK, max_new_tokens=1, use_cache=False, pad_token_id=0
            )
    assert [(call.phase, call.repeated) for call in captured.calls] == [("prefill", 0)] * 2
    with pytest.raises(ValueError, match="does not continue"):
        captured.row(0)
