"""Packed lines train what padded rows train, to the last digits of float64; models that would mix rows are refused."""

import functools

import lightning as L
import pytest
import torch
from fit_script import RandomWords
from tiny_backbone import tiny_tokenizer, tiny_trainer
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning import (
    AdapterConfig,
    BackboneConfig,
    ConfigError,
    GateRAModule,
    OptimizerConfig,
    adapter_parameters,
)
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.callbacks.gate_histogram import GateHistogram

CLIP = 0.05


def of_family(name, attention="sdpa", **config):
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **(sizes | config))
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.config.use_cache = False  # as load_backbone leaves it
    return model


class Watch(L.Callback):
    """Every step's loss and unclipped gradients; every micro-batch's rows and shape."""

    def __init__(self):
        self.losses, self.gradients, self.rows, self.shapes, self.packed = [], [], [], [], set()

    def on_train_start(self, trainer, module):
        """A gate that has learned nothing treats all tokens alike: no mix-up of tokens would show."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in adapter_parameters(module.model).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append({name: p.grad.clone() for name, p in adapter_parameters(module.model).items()})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append(batch["example_ids"].tolist())
        self.shapes.append(tuple(batch["input_ids"].shape))
        self.packed.add("position_ids" in batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def module_of(folder, **backbone):
    """Everything in float64; entropy counts."""
    return GateRAModule(
        backbone=BackboneConfig(id=str(folder), dtype="float64", **backbone),
        adapter=AdapterConfig(rank=4, gate=TokenGateConfig(bias=0.3), adapter_dtype="float64"),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1),
        gate_entropy_weight=0.5,
    )


def data_of(folder, **settings):
    """RandomWords of 12 to 56 tokens, not sorted by length: two to four of them fit into a line."""
    defaults = {
        "train_on": "response",
        "max_length": 100,
        "batch_size": 8,
        "group_by_length": False,
        "held_out": 2,
        "seed": 1,
    }
    data = RandomWords(**(defaults | settings))
    data.connect(load_tokenizer(BackboneConfig(id=str(folder))))
    return data


def fit(folder, root, packing, accumulate=1, checkpointing=False, **data):
    """The watch, the gates' counts, and the adapter after four optimizer steps."""
    module, watch, gates = module_of(folder, gradient_checkpointing=checkpointing), Watch(), GateHistogram()
    trainer = tiny_trainer(root, watch, gates, gradient_clip_val=CLIP, accumulate_grad_batches=accumulate)
    trainer.fit(module, datamodule=data_of(folder, packing=packing, **data))
    return watch, gates, {name: p.detach() for name, p in adapter_parameters(module.model).items()}


def close(found, expected):
    assert list(found) == list(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_packing_changes_nothing(folder, root, **settings):
    (padded, padded_gates, expected), (packed, packed_gates, found) = (
        fit(folder, root, on, **settings) for on in (False, True)
    )
    assert (padded.packed, packed.packed) == ({False}, {True})
    assert packed.rows == padded.rows  # the same rows in the same steps, in fewer places
    area = [sum(lines * width for lines, width in watch.shapes) for watch in (packed, padded)]
    assert area[0] < 0.95 * area[1]
    assert len(padded.losses) == 4
    assert packed.losses == pytest.approx(padded.losses, rel=1e-10)
    for mine, theirs in zip(packed.gradients, padded.gradients, strict=True):
        close(mine, theirs)
        assert torch.nn.utils.get_total_norm(theirs.values()) > 2 * CLIP  # else nothing is clipped
        assert all(gradient.any() for gradient in theirs.values())
    close(found, expected)
    assert packed_gates.names == padded_gates.names
    assert torch.equal(packed_gates.counts.bins, padded_gates.counts.bins)
    torch.testing.assert_close(
        packed_gates.counts.sums, padded_gates.counts.sums, rtol=1e-5, atol=1e-3
    )  # fp32 sums


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The folder of a tiny model and its tokenizer: a Llama, or a Mistral that sees eight tokens back, fewer than a row has."""

    @functools.cache
    def save(name):
        folder, tokenizer = tmp_path_factory.mktemp(name), tiny_tokenizer()
        window = {"sliding_window": 8} if name == "mistral" else {}
        of_family(name, vocab_size=len(tokenizer), **window).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"accumulate": 2}),
        ("llama", {"checkpointing": True}),
        ("llama", {"train_on": "all"}),
        ("llama", {"accumulate": 2, "checkpointing": True, "train_on": "all", "token_budget": 200}),
        ("mistral", {"accumulate": 2}),
    ],
    ids=str,
)
def test_losses_gradients_parameters_and_gates_are_those_of_padded_rows(backbone, tmp_path, name, settings):
    assert_packing_changes_nothing(backbone(name), tmp_path, **settings)


# --- models that mix packed sequences ---


def without_positions(model):
    """The same model, deaf to ``position_ids``."""
    inner = model.forward
    model.forward = lambda position_ids=None, **inputs: inner(**inputs)
    return model


@pytest.fixture
def deaf(tiny_backbone):
    """A module whose backbone ignores ``position_ids``."""
    module = module_of(tiny_backbone)
    module.configure_model()
    without_positions(module.model)
    return module


def test_fit_refuses_to_pack_for_a_model_that_mixes_rows(deaf, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(GateRAModule, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ConfigError) as caught:
        tiny_trainer(tmp_path).fit(deaf, datamodule=data_of(tiny_backbone, packing=True))
    assert str(caught.value) == (
        "data.packing: true, and packed rows see each other in LlamaForCausalLM with "
        "backbone.attn_implementation sdpa; accepted: false"
    )


def test_without_packing_such_a_model_is_trained(deaf, tiny_backbone, tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(deaf, datamodule=data_of(tiny_backbone))
    assert trainer.global_step == 1
