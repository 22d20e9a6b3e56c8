"""How much of a sharded model each rank holds, and that every mesh trains what one process does."""

import json
from pathlib import Path

import pytest
import torch
from adapted_layers import TRAINED_METHODS
from fits import assert_same, fit, read, run_script
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gatera_lightning import AdapterConfig, BackboneConfig, ConfigError, adapter_parameters, inject_adapters
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.backbone import load_backbone
from gatera_lightning.distributed.sharding import shard_layers

pytestmark = pytest.mark.slow

HELPERS = Path(__file__).parents[1] / "helpers"
SCRIPT = HELPERS / "sharding_script.py"
CLIP = 0.003  # below the gradient norm of every step


def fit_two(backbone, out, **job):
    """Train on two ranks; return what each of them holds."""
    run_script(SCRIPT, backbone, out, **job)
    return [json.loads((out / f"held_{rank}.json").read_text()) for rank in (0, 1)]


def assert_ranks_have_different_targets(out):
    """Otherwise a loss that is averaged over ranks instead of tokens would pass."""
    one, other = (json.loads((out / f"targets_{rank}.json").read_text()) for rank in (0, 1))
    assert len(one) == len(other)
    assert sum(a != b for a, b in zip(one, other, strict=True)) > len(one) / 2


@pytest.fixture(scope="module")
def one_process(tiny_backbone, tmp_path_factory):
    """Eight steps of different sizes on one process, each of them clipped."""
    out = tmp_path_factory.mktemp("one")
    fit(tiny_backbone, out, epochs=2, clip=CLIP)
    assert min(read(out)[1]) > CLIP
    return out


@pytest.mark.parametrize(("strategy", "share"), [("hsdp", 1), ("offload", 0.5)])
def test_replicated_and_offloaded_models_train_as_one_process(
    tiny_backbone, tmp_path, one_process, strategy, share
):
    """Two copies of one shard (2 × 1), and one copy in two shards on the CPU (1 × 2)."""
    job = {"strategy": strategy, "epochs": 2, "accumulate": 2, "checkpointing": True, "clip": CLIP}
    held = fit_two(tiny_backbone, tmp_path, **job)
    assert_same(tmp_path, one_process)
    assert_ranks_have_different_targets(tmp_path)
    for of_rank in held:
        assert of_rank["frozen_here"] / of_rank["frozen"] == pytest.approx(share, abs=0.05)


@pytest.fixture(scope="module", params=["fsdp", "hsdp"])
def every_method(request, tiny_backbone, tmp_path_factory):
    """An epoch of every update with every gate on two ranks."""
    out = tmp_path_factory.mktemp(request.param)
    job = {"strategy": request.param, "checkpointing": request.param == "hsdp"}
    run_script(HELPERS / "methods_script.py", tiny_backbone, out, accumulate=2, **job)
    return out


@pytest.mark.parametrize(("update", "gate"), TRAINED_METHODS)
def test_every_method_trains_as_one_process(tiny_backbone, tmp_path, every_method, update, gate):
    """A static gate's logits are a view of its parameter, whose memory is freed after the layer."""
    fit(tiny_backbone, tmp_path, update=update, gate=gate)
    assert_same(every_method / f"{update}-{gate}", tmp_path)


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_hard_gates_draw_the_same_when_sharded(tiny_backbone, tmp_path, strategy):
    """One process draws other numbers than two, so two replicated ranks are the reference."""
    job = {"update": "hira", "gate": "hard", "accumulate": 2, "draw_seed": 5}
    fit(tiny_backbone, tmp_path / "replicated", strategy="ddp", **job)
    fit(tiny_backbone, tmp_path / "sharded", strategy=strategy, checkpointing=strategy == "hsdp", **job)
    assert_same(tmp_path / "sharded", tmp_path / "replicated")


def test_ranks_that_differ_between_modules_train_as_one_process(tiny_backbone, tmp_path):
    adapter = {"target_modules": "all-linear", "exclude_modules": ["o_proj"], "alpha": 6.0}
    adapter |= {"rank_pattern": {"q_proj": 8, ".*1.mlp.*": 3}, "alpha_pattern": {"k_proj": 2.0}}
    fit(tiny_backbone, tmp_path / "one", update="lora", adapter=adapter)
    fit(tiny_backbone, tmp_path / "two", strategy="fsdp", accumulate=2, update="lora", adapter=adapter)
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.fixture(scope="module")
def deep_backbone(tiny_backbone, tmp_path_factory):
    """Eight layers, each about a ninth of the model, and an output head tied to the embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes))
    folder = tmp_path_factory.mktemp("deep")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(deep_backbone, tmp_path_factory):
    """The folder of an epoch on two ranks, and what each rank holds."""
    out = tmp_path_factory.mktemp("sharded")
    return out, fit_two(deep_backbone, out, strategy="fsdp")


def test_each_rank_holds_half_of_the_frozen_parameters(sharded):
    _, held = sharded
    assert held[0]["frozen"] > 5e6
    assert sum(of_rank["frozen_here"] for of_rank in held) == held[0]["frozen"]
    assert all(0.45 < of_rank["frozen_here"] / of_rank["frozen"] < 0.6 for of_rank in held)


def test_only_rank_zero_ever_holds_the_unsharded_model(sharded):
    """Rank 1 receives one tensor at a time, of which it keeps half."""
    _, (first, second) = sharded
    assert first["peak"] > 1.4 * first["frozen"]  # the model and its half: the measurement sees both
    assert second["peak"] < 0.65 * second["frozen"]


def test_sharded_model_equals_the_model_loaded_without_sharding(sharded, deep_backbone):
    """Backbone, initial adapter and buffers that no file holds, bit for bit."""
    loaded = torch.load(sharded[0] / "loaded.pt", weights_only=True)
    model = load_backbone(BackboneConfig(id=str(deep_backbone), dtype="float64"))
    adapter = AdapterConfig(rank=4, gate=TokenGateConfig(bias=0.3), adapter_dtype="float64")
    inject_adapters(model, adapter, torch.Generator().manual_seed(3))
    for kind, expected in (("parameters", model.named_parameters()), ("buffers", model.named_buffers())):
        expected = dict(expected)
        assert loaded[kind].keys() == expected.keys()
        assert all(loaded[kind][name].dtype == tensor.dtype for name, tensor in expected.items())
        assert all(torch.equal(loaded[kind][name], tensor) for name, tensor in expected.items())
    assert any("inv_freq" in name for name in loaded["buffers"])
    assert loaded["parameters"].keys() > adapter_parameters(model).keys()


def test_tied_embeddings_stay_tied_and_train_as_one_process(sharded, deep_backbone, tmp_path):
    out, held = sharded
    fit(deep_backbone, tmp_path)
    assert_same(out, tmp_path)
    assert_ranks_have_different_targets(out)
    assert all(of_rank["tied"] and of_rank["in_head"] for of_rank in held)


def test_decoder_layers_that_share_a_weight_are_rejected(tiny_llama):
    model = tiny_llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    inject_adapters(model, AdapterConfig(rank=4))
    with pytest.raises(
        ConfigError, match=r"0\.mlp\.up_proj\.base\.weight and 1\.mlp\.up_proj\.base\.weight share"
    ):
        shard_layers(model, mesh=None)


def test_nan_on_one_rank_skips_the_step_on_both(tiny_backbone, tmp_path):
    settings = {"epochs": 2, "poison": 7, "skip": 2}
    fit(tiny_backbone, tmp_path / "one", **settings)
    fit(tiny_backbone, tmp_path / "without", epochs=2)
    done = fit(tiny_backbone, tmp_path / "two", strategy="fsdp", **settings)
    assert done.stderr.count("of at most 2 steps") == 2
    assert_same(tmp_path / "two", tmp_path / "one", skipped=(1, 4))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "without", tmp_path / "one")
