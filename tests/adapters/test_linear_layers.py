"""Linear layers that share weights, compute more than a product, or have weights that cannot be adapted."""

import copy

import pytest
import torch
from adapted_layers import METHODS
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from gatera_lightning import AdapterConfig, ConfigError, adapter_parameters, inject_adapters, merge_adapter
from gatera_lightning.adapters.gates import StaticGateConfig, TokenGateConfig
from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.linear_layers import has_plain_forward
from gatera_lightning.adapters.lookup import adapted_linears


class Block(nn.Module):
    """A linear layer called ``q_proj``, and one that is never adapted."""

    def __init__(self, linear, other=None):
        super().__init__()
        self.q_proj = linear
        self.other = nn.Linear(7, 7).double() if other is None else other

    def forward(self, x):
        return self.other(torch.tanh(self.q_proj(x)))


def _linear(seed=0, bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(7, 7, bias=bias).double()


def _config(update="hira", gate="none", targets=("q_proj",), **settings):
    return AdapterConfig(
        update=update,
        gate=gate,
        rank=3,
        target_modules=list(targets),
        adapter_dtype="float64",
        **settings,
    )


def _input():
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


# --- layers that share a weight ---


def _one_module():
    linear = _linear()
    return nn.Sequential(Block(linear), Block(linear))


def _one_block():
    block = Block(_linear())
    return nn.Sequential(block, block)


def _one_weight():
    first, second = _linear(), _linear(1)
    second.weight = first.weight
    return nn.Sequential(Block(first), Block(second))


def _weight_of_layer_that_is_not_adapted():
    linear = _linear()
    block = Block(linear)
    block.other.weight = linear.weight
    return nn.Sequential(block, Block(_linear(1)))


def _views_of_one_tensor():
    fused = torch.cat([_linear().weight.detach(), _linear(1).weight.detach()])
    first, second = _linear(), _linear(1)
    first.weight, second.weight = (nn.Parameter(part) for part in (fused[:7], fused[3:10]))
    return nn.Sequential(Block(first), Block(second))


SHARED = [_one_module, _one_block, _one_weight, _weight_of_layer_that_is_not_adapted, _views_of_one_tensor]


@pytest.mark.parametrize("gate", ["none", "static"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
@pytest.mark.parametrize("build", SHARED)
def test_layers_that_share_a_weight_merge_to_the_same_output(randomize, build, update, gate):
    model = build()
    inject_adapters(model, _config(update, gate))
    assert all(isinstance(block.q_proj, AdaptedLinear) for block in model)
    randomize(model).eval()
    with torch.no_grad():
        expected = model(_input())
        merge_adapter(model)
        assert all(type(block.q_proj) is nn.Linear for block in model)
        torch.testing.assert_close(model(_input()), expected, rtol=1e-12, atol=1e-12)


def test_merging_leaves_another_model_with_the_same_weights_alone(randomize):
    """Two models may be built over one set of weights."""
    model = nn.Sequential(Block(_linear()), Block(_linear(1)))
    other = copy.deepcopy(model)
    for block, own in zip(other, model, strict=True):
        block.q_proj.weight = own.q_proj.weight
    with torch.no_grad():
        expected = other(_input())
        inject_adapters(model, _config())
        merge_adapter(randomize(model))
        assert torch.equal(other(_input()), expected)


def test_layer_with_two_names_is_one_layer(randomize):
    model = _one_module()
    report = inject_adapters(model, _config())
    assert report.layers == ("0.q_proj",)
    assert report.matches == {"q_proj": 1}
    assert model[0].q_proj is model[1].q_proj


@pytest.mark.parametrize("settings", [{"layers": [0]}, {"layers": [1]}, {"targets": [r"0\.q_proj"]}])
def test_layer_selected_under_one_of_two_names_is_rejected(settings):
    model = _one_module()
    with pytest.raises(ConfigError, match=r"\d.q_proj is the same layer as \d.q_proj, which is not selected"):
        inject_adapters(model, _config(**settings))
    assert not adapted_linears(model)


def test_module_that_refers_to_its_parent_is_searched_once():
    model = nn.Sequential(Block(_linear()), Block(_linear(1)))
    model[0].root = model
    assert inject_adapters(model, _config()).layers == ("0.q_proj", "1.q_proj")


def test_zamba2_merges_and_reloads_with_a_weight_for_each_layer(randomize, tmp_path):
    """Its attention blocks are separate modules with the same weights."""
    from transformers import Zamba2Config, Zamba2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "attention_head_dim": 16, "mamba_d_state": 8, "mamba_headdim": 8}
    sizes |= {
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "vocab_size": 64,
        "adapter_rank": 4,
    }
    model = (
        Zamba2ForCausalLM(Zamba2Config(layers_block_type=["mamba", "hybrid"] * 2, **sizes)).double().eval()
    )
    inject_adapters(model, _config(targets=["q_proj", "down_proj"]))
    ids = torch.arange(10).view(1, 10)
    with torch.no_grad():
        expected = randomize(model)(ids).logits
        merge_adapter(model).save_pretrained(tmp_path)
        torch.testing.assert_close(model(ids).logits, expected)
        reloaded = Zamba2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        torch.testing.assert_close(reloaded(ids).logits, expected)


# --- layers that compute more than W0 x + b ---


class ScaledInput(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def _with_forward_of_its_own():
    linear = _linear()
    original = linear.forward
    linear.forward = lambda x: original(x) + 1
    return linear


def _with_hook(register, hook):
    linear = _linear()
    getattr(linear, register)(hook)
    return linear


def _subclass(bias=True):
    linear = ScaledInput(7, 7, bias=bias).double()
    linear.load_state_dict(_linear(bias=bias).state_dict())
    return linear


def _accelerate_hook():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubles(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    return add_hook_to_module(_linear(), Doubles())


MORE_THAN_A_PRODUCT = {
    "subclass": _subclass,
    "subclass without bias": lambda: _subclass(bias=False),
    "forward of the instance": _with_forward_of_its_own,
    "forward hook": lambda: _with_hook("register_forward_hook", lambda module, args, y: 3 * y),
    "forward pre-hook": lambda: _with_hook("register_forward_pre_hook", lambda module, args: (-args[0],)),
    "accelerate": _accelerate_hook,
}
GATES = {
    "none": "none",
    "static": StaticGateConfig(bias=0.5),
    "token": "token",
    "thresholds": TokenGateConfig(skip_below=0.4, merge_above=0.6),
}


@pytest.mark.parametrize("kind", MORE_THAN_A_PRODUCT)
@pytest.mark.parametrize(("update", "gate"), [*METHODS, ("hira", "thresholds")], ids=lambda value: str(value))
def test_training_evaluation_and_inference_call_the_layer(randomize, kind, update, gate):
    """The output is what the layer returns, plus g · u(x)."""
    frozen = MORE_THAN_A_PRODUCT[kind]()
    assert not has_plain_forward(frozen)
    model, x = nn.Sequential(Block(frozen)), _input()
    inject_adapters(model, _config(update, GATES[gate]))
    layer = randomize(model)[0].q_proj
    with torch.no_grad():
        g = 1 if layer.gate is None else torch.sigmoid(layer.gate(x)).unsqueeze(-1)
        expected = frozen(x) + g * layer.update.delta(x, layer.base)
    torch.testing.assert_close(layer.train()(x).detach(), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)
        for thresholds in ({}, {"skip_below": 0.3, "merge_above": 0.7}):
            with prepared_for_inference(model, **thresholds):
                torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", MORE_THAN_A_PRODUCT)
def test_merge_rejects_layer_that_computes_more_than_a_product(randomize, kind):
    model = nn.Sequential(Block(MORE_THAN_A_PRODUCT[kind]()), Block(_linear()))
    inject_adapters(model, _config())
    randomize(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"0\.q_proj has hooks or a forward of its own"):
        merge_adapter(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- weights that cannot be adapted ---


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.ones(7, 1, dtype=torch.float64))

    def forward(self, weight):
        return weight + self.b @ self.b.t()


def _with_low_rank():
    linear = _linear()
    parametrize.register_parametrization(linear, "weight", LowRank())
    return linear


class Quantized(torch.Tensor):
    """Stands for the tensor classes of torchao: they report a shape and a dtype that they do not store."""


def _with_tensor_class():
    linear = _linear()
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantized), requires_grad=False)
    return linear


def _offloaded():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    linear = _linear()
    weights = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    return add_hook_to_module(
        linear, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    )


UNSUITABLE = {
    "weight_norm": (lambda: parametrizations.weight_norm(_linear()), "computed from other tensors"),
    "old weight_norm": (lambda: nn.utils.weight_norm(_linear()), "computed from other tensors"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(_linear()), "computed from other tensors"),
    "orthogonal": (lambda: parametrizations.orthogonal(_linear()), "computed from other tensors"),
    "low rank": (_with_low_rank, "computed from other tensors"),
    "pruning": (lambda: prune.l1_unstructured(_linear(), "weight", 0.5), "computed from other tensors"),
    "tensor class": (_with_tensor_class, "is a Quantized; accepted: weights that are not quantized"),
    "lazy": (lambda: nn.LazyLinear(7), "UninitializedParameter"),
    "float8": (lambda: _linear().to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "offloaded": (_offloaded, "on the meta device"),
    "never loaded": (lambda: nn.Linear(7, 7, device="meta"), "on the meta device"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", UNSUITABLE)
def test_unsuitable_weight_is_rejected_before_injection(kind):
    build, message = UNSUITABLE[kind]
    model = nn.Sequential(Block(_linear()), Block(build()))
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=f"1.q_proj is a .* weight .*{message}"):
        inject_adapters(model, _config())
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert not adapted_linears(model)


def test_model_without_memory_can_be_adapted():
    """Costs are estimated, and sharded models are built, on the meta device."""
    with torch.device("meta"):
        model = nn.Sequential(Block(nn.Linear(7, 7)))
    assert inject_adapters(model, _config()).layers == ("0.q_proj",)


@pytest.mark.parametrize("failing_layer", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError, ValueError, NotImplementedError])
def test_failure_in_any_layer_leaves_the_model_as_it_was(monkeypatch, failing_layer, error):
    model = nn.Sequential(Block(_linear()), Block(_linear(1)))
    model[0].other.requires_grad_(False)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    built = []

    def build(self, in_features, *, dtype, device):
        built.append(in_features)
        if len(built) > failing_layer:
            raise error("this gate cannot be built here")

    monkeypatch.setattr(StaticGateConfig, "build", build)
    with pytest.raises(error, match="cannot be built here"):
        inject_adapters(model, _config(gate="static"))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert not adapted_linears(model)
    assert not adapter_parameters(model)
