"""Packed sequences train like padded ones, to the last digits of float64, or the model is rejected."""

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


class Recorder(L.Callback):
    """Every step's loss and gradients before clipping; every micro-batch's examples and shape."""

    def __init__(self):
        self.losses, self.gradients, self.examples, self.shapes, self.packed = [], [], [], [], set()

    def on_train_start(self, trainer, module):
        """Change the adapter: an untrained gate treats all tokens alike, which would hide mixed-up tokens."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in adapter_parameters(module.model).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append({name: p.grad.clone() for name, p in adapter_parameters(module.model).items()})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.examples.append(batch["example_ids"].tolist())
        self.shapes.append(tuple(batch["input_ids"].shape))
        self.packed.add("position_ids" in batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def build_module(folder, **backbone):
    """A module in float64 with a large entropy term."""
    return GateRAModule(
        backbone=BackboneConfig(id=str(folder), dtype="float64", **backbone),
        adapter=AdapterConfig(
            rank=4, gate=TokenGateConfig(bias=0.3, entropy_weight=0.5), adapter_dtype="float64"
        ),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1),
    )


def build_data(folder, **settings):
    """Examples of 12 to 56 tokens, not sorted by length: two to four of them fit into a packed sequence."""
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
    """What was recorded, the gates' counts, and the adapter after four optimizer steps."""
    module, recorder = build_module(folder, gradient_checkpointing=checkpointing), Recorder()
    gates = GateHistogram()
    trainer = tiny_trainer(root, recorder, gates, gradient_clip_val=CLIP, accumulate_grad_batches=accumulate)
    trainer.fit(module, datamodule=build_data(folder, packing=packing, **data))
    return recorder, gates, {name: p.detach() for name, p in adapter_parameters(module.model).items()}


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """``backbone(name)``: a folder with a tiny model, and its tokenizer.

    The Mistral attends to eight tokens, fewer than an example has.
    """
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }

    @functools.cache
    def save(name):
        folder, tokenizer = tmp_path_factory.mktemp(name), tiny_tokenizer()
        window = {"sliding_window": 8} if name == "mistral" else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **sizes, **window)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
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
def test_packing_changes_no_number(backbone, tmp_path, name, settings):
    (padded, padded_gates, expected), (packed, packed_gates, found) = (
        fit(backbone(name), tmp_path, packing, **settings) for packing in (False, True)
    )
    assert (padded.packed, packed.packed) == ({False}, {True})
    assert packed.examples == padded.examples  # the same examples in the same steps, in fewer positions
    positions = [
        sum(sequences * length for sequences, length in recorder.shapes) for recorder in (packed, padded)
    ]
    assert positions[0] < 0.95 * positions[1]
    assert len(padded.losses) == 4
    assert packed.losses == pytest.approx(padded.losses, rel=1e-10)
    for ours, theirs in zip(packed.gradients, padded.gradients, strict=True):
        assert_close(ours, theirs)
        assert torch.nn.utils.get_total_norm(theirs.values()) > 2 * CLIP  # so gradients were clipped
        assert all(gradient.any() for gradient in theirs.values())
    assert_close(found, expected)
    assert packed_gates.names == padded_gates.names
    assert torch.equal(packed_gates.counts.bins, padded_gates.counts.bins)
    fp32 = {"rtol": 1e-5, "atol": 1e-3}  # the sums are in fp32
    torch.testing.assert_close(packed_gates.counts.sums, padded_gates.counts.sums, **fp32)


@pytest.fixture
def mixing_module(tiny_backbone):
    """A module whose model ignores ``position_ids``, and so mixes packed sequences."""
    module = build_module(tiny_backbone)
    module.configure_model()
    forward = module.model.forward
    module.model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    return module


def test_fit_rejects_packing_for_model_that_mixes_sequences(
    mixing_module, tiny_backbone, tmp_path, monkeypatch
):
    monkeypatch.setattr(GateRAModule, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ConfigError) as caught:
        tiny_trainer(tmp_path).fit(mixing_module, datamodule=build_data(tiny_backbone, packing=True))
    assert str(caught.value) == (
        "data.packing: true, but packed sequences influence each other in LlamaForCausalLM with "
        "backbone.attn_implementation sdpa; accepted: false"
    )


def test_fit_without_packing_accepts_model_that_mixes_sequences(mixing_module, tiny_backbone, tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(mixing_module, datamodule=build_data(tiny_backbone))
    assert trainer.global_step == 1
