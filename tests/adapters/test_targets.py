"""Which layers are selected, and with which rank and alpha, compared with Hugging Face PEFT's own choice."""

import json

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import nn

from gatera_lightning import (
    AdapterConfig,
    AdapterFileError,
    ConfigError,
    adapter_parameters,
    inject_adapters,
    load_adapter,
    save_adapter,
)
from gatera_lightning.adapters.gates import NoGateConfig
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.adapters.serialization import read_adapter_config
from gatera_lightning.peft import GateRAConfig
from gatera_lightning.peft.own_methods import peft_method_problem, write_peft_method

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = SIZES | {"intermediate_size": 24}
GROUPED = WIDE | {"num_key_value_heads": 2}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "tied_llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED, pad_token_id=0)),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**WIDE)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**WIDE)),
    "classifier": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**GROUPED)),
}


def _peft_layers(model, **settings):
    """Return PEFT's choice: the name of each layer -> its rank and scale."""
    task = "SEQ_CLS" if type(model).__name__.endswith("Classification") else None
    config = peft.LoraConfig(r=2, lora_alpha=6, task_type=task, **settings)
    if task:  # PEFT trains a copy of the head as well, which is no adapted layer
        model = peft.tuners.lora.LoraModel(model, config, "default").model
    else:
        model = peft.get_peft_model(model, config).get_base_model()
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        # PEFT adapts the parameters of Mixtral's experts as well
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear)
    }


def _our_layers(model, **settings):
    config = AdapterConfig(update="lora", gate=NoGateConfig(), rank=2, alpha=6.0, **settings)
    inject_adapters(model, config)
    return {name: (len(layer.update.a), layer.update.scale) for name, layer in adapted_linears(model).items()}


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits


def _problem(model, **settings):
    with pytest.raises(ConfigError) as caught:
        inject_adapters(model, AdapterConfig(**{"rank": 2} | settings))
    assert not adapted_linears(model)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_pefts(family):
    found = _our_layers(FAMILIES[family](), target_modules="all-linear")
    assert found == _peft_layers(FAMILIES[family](), target_modules="all-linear")
    assert len(found) >= 12


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "neox", "opt"])
@pytest.mark.parametrize(
    "ours",
    [
        {"exclude_modules": ["dense", "o_proj", "down_proj", "out_proj"]},
        {"exclude_modules": [r".*\.1\..*"]},
        {"rank_pattern": {r".*\.1\..*": 3, r"layers\.2\..*": 4}},
        {"rank_pattern": {r"layers.0\..*": 1}, "alpha_pattern": {r".*(0|2)\..*": 5.0}},
    ],
    ids=["names", "expression", "ranks", "alphas"],
)
def test_exclusions_and_patterns_are_pefts(family, ours):
    if "exclude_modules" in ours:
        present = {name.rpartition(".")[2] for name, _ in FAMILIES[family]().named_modules()}
        names = [name for name in ours["exclude_modules"] if "*" in name or name in present]
        theirs = {"exclude_modules": names[0] if "*" in names[0] else names}
        ours = {"exclude_modules": names}
    else:
        theirs = ours
    found = _our_layers(FAMILIES[family](), target_modules="all-linear", **ours)
    assert found == _peft_layers(FAMILIES[family](), target_modules="all-linear", **theirs)


def test_first_matching_key_counts_as_in_peft():
    settings = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 5, "q_proj": 3, ".*v_proj": 4},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 2.0},
    }
    found = _our_layers(FAMILIES["llama"](), **settings)
    assert found == _peft_layers(FAMILIES["llama"](), **settings)
    assert {rank for rank, _ in found.values()} == {3, 4, 5}


def test_alpha_of_null_follows_the_rank():
    model = FAMILIES["llama"]()
    config = AdapterConfig(update="lora", rank=2, target_modules=["q_proj"], rank_pattern={"0.*q_proj": 4})
    inject_adapters(model, config)
    assert {layer.update.scale for layer in adapted_linears(model).values()} == {1.0}


@pytest.mark.parametrize("layers", [[-1], [0, -1], [-3, -2]])
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_negative_layers_count_from_the_end(layers, targets):
    negative = _our_layers(FAMILIES["llama"](), target_modules=targets, layers=layers)
    positive = _our_layers(FAMILIES["llama"](), target_modules=targets, layers=[i % 3 for i in layers])
    assert negative == positive
    indices = [i % 3 for i in layers]
    assert positive == {
        name: parts for name, parts in _our_layers(FAMILIES["llama"](), target_modules=targets).items()
        if int(name.split(".")[2]) in indices
    }  # fmt: skip


def test_heads_are_left_out_however_they_are_tied():
    class TwoHeads(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.second_head = nn.Linear(16, 64, bias=False)
            self.second_head.weight = self.model.embed_tokens.weight

    found = _our_layers(TwoHeads(transformers.LlamaConfig(**GROUPED)), target_modules="all-linear")
    assert {name.rpartition(".")[2] for name in found} >= {"q_proj", "down_proj"}
    assert not [name for name in found if "head" in name]


def test_plain_module_has_no_head():
    found = _our_layers(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), target_modules="all-linear"
    )
    assert set(found) == {"0", "2"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers": [-4, 1]}, "adapter.layers: [-4] do not exist; the model's decoder layers are 0…2"),
        ({"exclude_modules": ["o_prj"]}, "adapter.exclude_modules: 'o_prj' matches no linear layer; "),
        ({"exclude_modules": ["o_prj"]}, "did you mean 'o_proj'?"),
        (
            {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]},
            "adapter.target_modules: 'o_proj' matches only what adapter.exclude_modules ['o_proj'] leaves",
        ),
        (
            {"target_modules": "all-linear", "exclude_modules": [".*"]},
            "adapter.target_modules: all-linear matches only what adapter.exclude_modules",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 3}},
            "adapter.rank_pattern: 'k_proj' matches no adapted layer; they are q_proj × 3",
        ),
        ({"rank_pattern": {"down_prj": 3}}, "did you mean 'down_proj'?"),
        (
            {"rank_pattern": {".*_proj": 3, "q_proj": 4}},
            "adapter.rank_pattern: 'q_proj' has no effect, because '.*_proj' stands before it and matches "
            "model.layers.0.self_attn.q_proj",
        ),
        (
            {"rank_pattern": {"down_proj": 17}},
            "adapter.rank_pattern.down_proj: 17 exceeds model.layers.0.mlp.down_proj (24 -> 16)",
        ),
        (
            {"update": "lora", "alpha_pattern": {"k_prj": 3.0}},
            "adapter.alpha_pattern: 'k_prj' matches no adapted layer",
        ),
    ],
)
def test_what_has_no_effect_is_refused(settings, expected):
    assert expected in _problem(FAMILIES["llama"](), **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": "all_linear"}, "'all_linear' is no list; .*did you mean 'all-linear'?"),
        ({"target_modules": "q_proj"}, "'q_proj' is no list; accepted: a list of names and regexes, or all"),
        ({"target_modules": ["all-linear"]}, "accepted: all-linear without a list"),
        ({"exclude_modules": "q_proj"}, "adapter.exclude_modules: 'q_proj'; accepted: a list"),
        ({"exclude_modules": ["("]}, r"adapter.exclude_modules: '\(' is not a regular expression"),
        ({"rank_pattern": ["q_proj"]}, "adapter.rank_pattern: .*; accepted: a table"),
        (
            {"rank_pattern": {"q_proj": 0}},
            "adapter.rank_pattern.q_proj: 0; accepted: an integer of at least 1",
        ),
        ({"rank_pattern": {"q_proj": 1.5}}, "adapter.rank_pattern.q_proj: 1.5; accepted: an integer"),
        ({"rank_pattern": {"(": 2}}, r"adapter.rank_pattern: '\(' is not a regular expression"),
        ({"rank_pattern": {3: 2}}, "adapter.rank_pattern: 3 is not a string"),
        ({"alpha_pattern": {"q_proj": 2.0}}, "adapter.alpha_pattern: .*'hira' has no scale"),
        (
            {"update": "lora", "alpha_pattern": {"q_proj": -1}},
            "adapter.alpha_pattern.q_proj: -1; accepted: a number above 0",
        ),
        ({"layers": [True]}, r"adapter.layers: \[True\]; accepted"),
    ],
)
def test_values_that_cannot_work_are_named(settings, expected):
    (problem,) = AdapterConfig(**settings).problems()
    with pytest.raises(ConfigError, match=expected):
        raise ConfigError(problem)


STORED = {
    "all": {"target_modules": "all-linear"},
    "all_but": {"target_modules": "all-linear", "exclude_modules": ["o_proj", r".*\.1\.mlp.*"]},
    "last": {"target_modules": ["q_proj", "down_proj"], "layers": [-1]},
    "all_last": {"target_modules": "all-linear", "layers": [0, -1]},
    "last_regex": {"target_modules": [".*mlp.*"], "layers": [-1]},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3, r"layers.1.*": 1}},
    # Sorted, as in a JSON file of PEFT, the general key stands before the particular one.
    "order": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3, ".*_proj": 1}},
    "alphas": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers.0.*_proj": 7.0, "q_proj": 5.0}},
}


@pytest.mark.parametrize("case", STORED)
def test_folder_has_the_same_layers_and_ranks_everywhere(case, tmp_path):
    torch.manual_seed(0)
    backbone = FAMILIES["llama"]()
    backbone.save_pretrained(tmp_path / "backbone")
    config = AdapterConfig(update="lora", rank=2, **STORED[case])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    inject_adapters(model, config)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    expected = _logits(model)
    save_adapter(model, tmp_path / "adapter")

    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(_logits(again), expected)
    assert list(adapter_parameters(again)) == list(adapter_parameters(model))
    load_adapter(model, tmp_path / "adapter")  # into the model that has the adapter already
    save_adapter(again, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()

    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(_logits(theirs), expected)


@pytest.mark.parametrize("update", ["lora", "dora"])
def test_pefts_own_methods_have_the_patterns(update, tmp_path):
    torch.manual_seed(0)
    backbone = FAMILIES["llama"]()
    backbone.save_pretrained(tmp_path / "backbone")
    patterns = {"rank_pattern": {"q_proj": 3, r".*1\.mlp.*": 1}, "exclude_modules": ["o_proj"]}
    config = AdapterConfig(
        update=update, gate=NoGateConfig(), rank=2, target_modules="all-linear", **patterns
    )
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    inject_adapters(model, config)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    expected = _logits(model)
    tensors = {name: parameter.detach() for name, parameter in adapter_parameters(model).items()}
    origin = {"id": str(tmp_path / "backbone"), "revision": None}
    folder = write_peft_method(tmp_path / "adapter", tensors, config, origin)

    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    assert (_logits(peft.PeftModel.from_pretrained(fresh, folder)) - expected).abs().max() < 1e-6
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    load_adapter(again, folder)
    assert (_logits(again) - expected).abs().max() < 1e-6


def test_hira_of_peft_has_one_rank():
    config = AdapterConfig(gate=NoGateConfig(), rank_pattern={"q_proj": 3})
    assert "rank_pattern: {'q_proj': 3}" in str(peft_method_problem(config, lora_only=False))
    theirs = peft.HiraConfig(r=2, target_modules=["q_proj"], rank_pattern={"q_proj": 3})
    model = peft.get_peft_model(FAMILIES["llama"](), theirs)
    shapes = {parameter.shape for name, parameter in model.named_parameters() if "hira_A" in name}
    assert shapes == {(2, 16)}, "PEFT now applies rank_pattern: export it"


def test_lora_of_peft_with_patterns_loads(tmp_path):
    torch.manual_seed(0)
    backbone = FAMILIES["llama"]()
    backbone.save_pretrained(tmp_path / "backbone")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=r".*\.2\..*",
        init_lora_weights=False,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.0.self_attn.v_proj": 3},
    )
    model = peft.get_peft_model(backbone, config)
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    loaded = load_adapter(again, tmp_path / "adapter")
    assert (_logits(again) - _logits(model)).abs().max() < 1e-6
    assert (loaded.rank_pattern, loaded.alpha) == ({"q_proj": 2}, 4)


def test_rank_stabilized_lora_with_patterns_is_refused(tmp_path):
    config = peft.LoraConfig(r=4, use_rslora=True, target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    peft.get_peft_model(FAMILIES["llama"](), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="use_rslora: True with rank_pattern"):
        load_adapter(FAMILIES["llama"](), tmp_path)


def test_adapter_with_other_scale_in_one_layer_is_refused(tmp_path):
    settings = {"update": "lora", "rank": 2, "target_modules": ["q_proj"]}
    model = FAMILIES["llama"]()
    inject_adapters(model, AdapterConfig(**settings, alpha_pattern={"layers.1.*": 3.0}))
    save_adapter(model, tmp_path)
    other = FAMILIES["llama"]()
    inject_adapters(other, AdapterConfig(**settings))
    with pytest.raises(AdapterFileError, match=r"rank=2 scale=1.5 in model.layers.1.self_attn.q_proj, but"):
        load_adapter(other, tmp_path)


def test_stored_names_of_all_linear_are_listed(tmp_path):
    model = FAMILIES["llama"]()
    inject_adapters(model, AdapterConfig(rank=2, target_modules="all-linear", layers=[-1]))
    save_adapter(model, tmp_path)
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    assert description["target_modules"] == sorted(adapted_linears(model))
    assert read_adapter_config(tmp_path)[0].layers is None


def test_peft_config_has_negative_layers_and_all_linear():
    config = GateRAConfig(r=2, target_modules=["q_proj"], layers_to_transform=[-1])
    model = peft.get_peft_model(FAMILIES["llama"](), config).get_base_model()
    assert list(adapted_linears(model)) == ["model.layers.2.self_attn.q_proj"]
    config = GateRAConfig(r=2, target_modules="all-linear")
    model = peft.get_peft_model(FAMILIES["llama"](), config).get_base_model()
    assert len(adapted_linears(model)) == 21


def test_report_counts_all_linear_by_name():
    report = inject_adapters(FAMILIES["phi3"](), AdapterConfig(rank=2, target_modules="all-linear"))
    assert report.matches == {"o_proj": 3, "qkv_proj": 3, "gate_up_proj": 3, "down_proj": 3}


FROM_PEFT = {
    "first_key_counts": {
        "target_modules": "all-linear",
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 5, ".*v_proj": 4, "layers.0.*": 3},
    },
    "last_layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": -1},
    "excluded_name": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.1.self_attn.q_proj"],
    },
    # PEFT accepts settings without effect. It lists the names of all-linear itself, with those it leaves out.
    "all_but": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "nothing_excluded": {"target_modules": ["q_proj"], "exclude_modules": ["nothing"]},
    "unused_key": {"target_modules": ["q_proj"], "rank_pattern": {"nothing": 3}},
    "shadowed_key": {"target_modules": ["q_proj"], "rank_pattern": {".*_proj": 3, "q_proj": 4}},
}


@pytest.mark.parametrize("update", ["lora", "hira"])
@pytest.mark.parametrize("case", FROM_PEFT)
def test_folder_that_peft_trained_loads(case, update, tmp_path):
    torch.manual_seed(0)
    backbone = FAMILIES["llama"]()
    backbone.save_pretrained(tmp_path / "backbone")
    model = peft.get_peft_model(backbone, GateRAConfig(update=update, r=2, **FROM_PEFT[case]))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    expected = _logits(model)
    model.save_pretrained(tmp_path / "theirs")

    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    load_adapter(ours, tmp_path / "theirs")
    assert torch.equal(_logits(ours), expected)
    save_adapter(ours, tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    assert torch.equal(_logits(peft.PeftModel.from_pretrained(again, tmp_path / "ours")), expected)


def test_lora_of_peft_for_all_linear_but_some_loads(tmp_path):
    torch.manual_seed(0)
    backbone = FAMILIES["llama"]()
    backbone.save_pretrained(tmp_path / "backbone")
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=["o_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(backbone, config)
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "backbone")
    load_adapter(again, tmp_path / "adapter")
    assert (_logits(again) - _logits(model)).abs().max() < 1e-6
