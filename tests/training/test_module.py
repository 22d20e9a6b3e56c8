"""GateRAModule: its step against a plain loop, its logging, and its checkpoints."""

import csv
import inspect
import math
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fit_script import Job, RandomWords, run
from lightning.pytorch.loggers import CSVLogger
from tiny_backbone import tiny_data, tiny_module, tiny_trainer
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from gatera_lightning import (
    AdapterConfig,
    BackboneConfig,
    ConfigError,
    GateRAModule,
    NonFiniteLossError,
    OptimizerConfig,
    adapter_parameters,
    inject_adapters,
    save_adapter,
)
from gatera_lightning.adapters.gates import StaticGateConfig, TokenGateConfig
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.backbone.loading import load_backbone, load_tokenizer
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.callbacks.throughput import Throughput
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.errors import CheckpointError
from gatera_lightning.objectives import linear_cross_entropy


def reference_losses(folder, attention, epochs):
    """Plain PyTorch: one forward pass per step, full logits, means, and the definition of entropy."""
    backbone = BackboneConfig(id=str(folder), dtype="float64", attn_implementation=attention)
    model = load_backbone(backbone)
    config = AdapterConfig(rank=4, gate=TokenGateConfig(bias=0.3), adapter_dtype="float64")
    inject_adapters(model, config, torch.Generator().manual_seed(3))
    model.train()
    inputs = {}
    for name, layer in adapted_linears(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))

    data = RandomWords(
        train_on="response",
        max_length=64,
        batch_size=8,
        eval_batch_size=4,
        token_budget=None,
        group_by_length=True,
        num_workers=0,
        seed=1,
        held_out=2,
    )
    data.connect(load_tokenizer(backbone))
    data.setup("fit")
    loader = data.train_dataloader()
    steps = loader.dataset
    parameters = adapter_parameters(model)
    gates = [p for name, p in parameters.items() if ".gate." in name]
    updates = [p for name, p in parameters.items() if ".gate." not in name]
    optimizer = torch.optim.AdamW(
        [{"params": updates, "lr": 1e-2}, {"params": gates, "lr": 5e-3}], weight_decay=0.0
    )
    peak = [group["lr"] for group in optimizer.param_groups]
    total, losses = epochs * len(steps), []
    for step in range(total):
        batch = steps[loader.order(step // len(steps))[step % len(steps)]]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        task = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )
        entropies = []
        for name, layer in adapted_linears(model).items():
            g = torch.sigmoid(inputs[name] @ layer.gate.weight + layer.gate.bias)[batch["attention_mask"] > 0]
            entropies.append(-(g * g.log() + (1 - g) * (1 - g).log()).mean())
        loss = task + 0.1 * torch.stack(entropies).mean()
        factor = (step + 1) / 3 if step < 2 else 1 - (step - 2) / (total - 2)
        for group, lr in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def capped(tiny_backbone, tmp_path_factory):
    """A tiny Gemma 2, whose logits are capped after the head, at a value that they reach."""
    tokenizer, folder = AutoTokenizer.from_pretrained(tiny_backbone), tmp_path_factory.mktemp("capped")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "vocab_size": len(tokenizer),
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=0.1, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("backbone", "attention", "in_head", "rel"),
    [
        ("tiny_backbone", "sdpa", True, 1e-12),
        ("capped", "eager", False, 1e-10),  # Gemma's norms are fp32 with any dtype
    ],
)
def test_losses_match_plain_loop(backbone, attention, in_head, rel, request, tmp_path, monkeypatch):
    """With the loss computed in the head, a few positions at a time, and from logits that the model caps."""
    folder, sizes, chunk_loss = request.getfixturevalue(backbone), set(), linear_cross_entropy._chunk_loss

    def recorded(hidden, *rest):
        sizes.add(len(hidden))
        return chunk_loss(hidden, *rest)

    monkeypatch.setattr(linear_cross_entropy, "LOGITS_PER_CHUNK", 4000)  # ten positions
    monkeypatch.setattr(linear_cross_entropy, "_chunk_loss", recorded)
    found = run(Job(str(folder), str(tmp_path), accumulate=2, epochs=2, attention=attention))
    expected = reference_losses(folder, attention, 2)
    assert [float.fromhex(loss) for loss in found.losses] == pytest.approx(expected, rel=rel)
    assert max(sizes, default=0) == (10 if in_head else 0)


@pytest.fixture
def trainer():
    """A Trainer to attach to a module whose step is called directly."""
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("in_head", [True, False])
def test_step_without_supervised_tokens_has_zero_loss(build, batch_of, trainer, in_head):
    module = build(gate={"entropy_weight": 0.0})
    if in_head:
        module.on_train_start()
    module.trainer = trainer
    loss = module.training_step(batch_of([[IGNORE_INDEX] * 5, [IGNORE_INDEX] * 5]), 0)["loss"]
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is not None and not p.grad.any() for p in adapter_parameters(module.model).values())


def test_padding_does_not_change_loss(build, batch_of, trainer):
    module = build(gate={"entropy_weight": 0.5})
    torch.manual_seed(0)
    for parameter in adapter_parameters(module.model).values():
        parameter.data.normal_(std=0.3)
    module.trainer = trainer
    short = batch_of([[IGNORE_INDEX, IGNORE_INDEX, 7, 8]])
    padded = short | {
        name: F.pad(value, (0, 3), value=IGNORE_INDEX if name == "labels" else 0)
        for name, value in short.items()
        if isinstance(value, torch.Tensor) and value.ndim == 2
    }
    losses = [float(module.training_step(batch, 0)["loss"]) for batch in (padded, short)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_step_returns_detached_gates(build, batch_of, trainer):
    module, batch = build(), batch_of([[IGNORE_INDEX, 7, 8], [5, 6, 7]])
    module.trainer = trainer
    outputs = module.training_step(batch, 0)
    assert set(outputs) == {"loss", "gates"}
    assert outputs["gates"].names == list(adapted_linears(module.model))
    assert outputs["gates"].stacked(batch["attention_mask"]).shape == (10, 2, 3)
    assert not any(logit.requires_grad for logit in outputs["gates"].logits)


def test_forward_returns_logits_at_supervised_positions(build, batch_of):
    module = build()
    found = module(batch_of([[IGNORE_INDEX, 7, 8], [5, IGNORE_INDEX, 6]]))
    assert found.labels.tolist() == [7, 8, 6]
    assert found.positions.tolist() == [[True, True, False], [False, True, False]]
    assert found.logits.shape == (1, 3, module.model.config.vocab_size)


def test_model_is_frozen_and_in_training_mode(build):
    module = build(adapter={"dropout": 0.5})
    assert all(m.training for m in module.model.modules())
    adapter = {id(p) for p in adapter_parameters(module.model).values()}
    assert all(p.requires_grad == (id(p) in adapter) for p in module.model.parameters())


def test_configure_model_keeps_loaded_model(build):
    module = build()
    model = module.model
    module.configure_model()
    assert module.model is model


def test_warm_start_takes_values_of_folder(build, tmp_path):
    first = build()
    for parameter in adapter_parameters(first.model).values():
        parameter.data.normal_()
    save_adapter(first.model, tmp_path / "adapter")
    second = build(warm_start=str(tmp_path / "adapter"))
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_trainer_is_checked_before_weights_are_loaded(tiny_backbone, verb):
    module = tiny_module(tiny_backbone)
    trainer = L.Trainer(
        accelerator="cpu", precision="bf16-true", max_steps=1, logger=False, enable_checkpointing=False
    )
    with pytest.raises(ConfigError, match=r"trainer\.precision: 'bf16-true'"):
        getattr(trainer, verb)(module, tiny_data(tiny_backbone))
    assert module.model is None


def test_failed_run_does_not_affect_next_run(tiny_backbone, tmp_path):
    """As in a notebook: the same module, after its cause is repaired."""
    module, data = tiny_module(tiny_backbone), tiny_data(tiny_backbone)
    module.configure_model()
    first = next(iter(adapter_parameters(module.model).values()))
    values = first.detach().clone()
    first.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError):
        tiny_trainer(tmp_path).fit(module, data)
    first.data.copy_(values)
    trainer = tiny_trainer(tmp_path)
    trainer.fit(module, tiny_data(tiny_backbone))
    assert trainer.global_step > 1
    assert math.isfinite(trainer.callback_metrics["train/loss"])


# --- settings ---


def test_deprecated_arguments_move_into_gate_settings(tiny_backbone):
    backbone = BackboneConfig(id=str(tiny_backbone))
    with pytest.warns(DeprecationWarning, match=r"use adapter\.gate\.lr_multiplier") as first:
        optimizer = OptimizerConfig(gate_lr_multiplier=0.5)
    settings = {"backbone": backbone, "adapter": AdapterConfig(), "optimizer": optimizer}
    with pytest.warns(DeprecationWarning, match=r"use adapter\.gate\.entropy_weight") as second:
        module = GateRAModule(**settings, gate_entropy_weight=0.2)
    assert [warning.filename for warning in (*first, *second)] == [__file__, __file__]
    assert module.adapter.gate == TokenGateConfig(lr_multiplier=0.5, entropy_weight=0.2)
    assert module.optimizer == OptimizerConfig()
    assert module.optimizer.gate_lr_multiplier is None
    assert module.objectives[1].weight == 0.2
    assert not {"gate_lr_multiplier", "gate_entropy_weight"} & {
        name for config in (GateRAModule, OptimizerConfig) for name in inspect.signature(config).parameters
    }


def test_unknown_argument_is_rejected(tiny_backbone):
    settings = {"backbone": BackboneConfig(id=str(tiny_backbone)), "adapter": AdapterConfig()}
    with pytest.raises(TypeError, match="GateRAModule has no argument gate_entropy"):
        GateRAModule(**settings, optimizer=OptimizerConfig(), gate_entropy=0.2)


@pytest.mark.parametrize(
    ("adapter", "weight"),
    [
        (AdapterConfig(gate=TokenGateConfig(entropy_weight=0.2)), 0.2),
        (AdapterConfig(gate=StaticGateConfig(entropy_weight=0.3)), 0.3),
        (AdapterConfig(gate="none"), 0.0),
        (AdapterConfig(gate="cubic"), 0.0),  # problems() reports it
    ],
)
def test_entropy_weight_is_that_of_gate_settings(tiny_backbone, adapter, weight):
    backbone = BackboneConfig(id=str(tiny_backbone))
    module = GateRAModule(backbone=backbone, adapter=adapter, optimizer=OptimizerConfig())
    assert module.objectives[1].weight == weight


# --- logging ---


class Validations(L.Callback):
    """The optimizer steps after which validations ran."""

    def __init__(self):
        self.steps = []

    def on_validation_end(self, trainer, module):
        self.steps.append(trainer.global_step)


def logged_rows(logger):
    with open(Path(logger.log_dir, "metrics.csv")) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_everything_is_logged_under_its_optimizer_step(tiny_backbone, tmp_path, accumulate):
    """The module's values, those of callbacks, and a validation after every micro-batch."""
    validations, logger = Validations(), CSVLogger(tmp_path)
    settings = {
        "limit_val_batches": 1,
        "val_check_interval": 1,
        "accumulate_grad_batches": accumulate,
        "logger": logger,
    }
    trainer = tiny_trainer(tmp_path, Throughput(1), validations, AdapterCheckpoint(), **settings)
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone, train=["everyday[:24]"]))
    rows = logged_rows(logger)
    steps = {name: [int(row["step"]) for row in rows if row[name]] for name in rows[0]}
    for name in ("train/loss", "lr/gate", "grad_norm/update", "throughput/step_seconds"):
        assert steps[name] == [1, 2, 3, 4]
    assert steps["val/loss"] == validations.steps
    assert [float(row["epoch"]) for row in rows if row["train/loss"]] == [0, 0, 0, 1]
    assert all(row["epoch"] for row in rows if row["val/loss"])
    best = min((float(row["val/loss"]), int(row["step"])) for row in rows if row["val/loss"])[1]
    assert Path(trainer.checkpoint_callback.best_model_path).name == f"best-step={best}.ckpt"


@pytest.mark.parametrize(("gate", "gated"), [("token", True), ("static", True), ("none", False)])
def test_names_of_logged_values(tiny_backbone, tmp_path, gate, gated):
    logger = CSVLogger(tmp_path)
    module = tiny_module(tiny_backbone, gate=gate)
    tiny_trainer(tmp_path, max_steps=1, logger=logger).fit(module, datamodule=tiny_data(tiny_backbone))
    (row,) = logged_rows(logger)
    expected = {"epoch", "step", "train/loss", "train/task_loss", "lr/update", "grad_norm/update"}
    if gated:
        expected |= {"train/gate_entropy", "train/gate_mean", "lr/gate", "grad_norm/gate"}
    assert set(row) == expected


# --- checkpoints ---


def test_state_dict_holds_adapter_only(build):
    module = build()
    assert set(module.state_dict()) == {f"model.{name}" for name in adapter_parameters(module.model)}


def test_load_from_checkpoint_restores_settings_and_values(tiny_backbone, tmp_path):
    run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", save_at=[2]))
    module = GateRAModule.load_from_checkpoint(tmp_path / "step_2.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "step_2.ckpt", weights_only=True)["state_dict"]
    gate = TokenGateConfig(bias=0.3, entropy_weight=0.1, lr_multiplier=0.5)
    assert module.adapter == AdapterConfig(rank=4, gate=gate)
    assert module.optimizer == OptimizerConfig(lr=1e-2, warmup_steps=2)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, saved[name])
    changed = GateRAModule.load_from_checkpoint(
        tmp_path / "step_2.ckpt", optimizer=replace(module.optimizer, lr=0.5)
    )
    assert (changed.optimizer.lr, changed.adapter) == (0.5, module.adapter)


def test_checkpoint_of_other_adapter_is_rejected(build, tiny_backbone, tmp_path):
    run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", save_at=[2]))
    checkpoint = torch.load(tmp_path / "step_2.ckpt", weights_only=True)
    checkpoint["state_dict"].pop(next(iter(checkpoint["state_dict"])))
    with pytest.raises(CheckpointError, match="1 missing tensors"):
        build().on_load_checkpoint(checkpoint)


def test_checkpoint_of_other_program_is_rejected(tiny_backbone, tmp_path):
    content = {"state_dict": {}, "global_step": 3, "loops": {}, "pytorch-lightning_version": "2.6.0"}
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of an adapter; it lacks adapter, backbone"):
        tiny_trainer(tmp_path).test(
            tiny_module(tiny_backbone), tiny_data(tiny_backbone), ckpt_path=tmp_path / "other.ckpt"
        )


def test_resume_warns_about_random_states_of_other_world_size(
    build, batch_of, tiny_backbone, tmp_path, caplog
):
    run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", save_at=[2]))
    path = tmp_path / "step_2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["RNGState"]["ranks"] *= 2
    torch.save(checkpoint, path)
    uninterrupted = run(Job(str(tiny_backbone), str(tmp_path), dtype="float32"))
    resumed = run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", resume=str(path)))
    assert resumed.losses == uninterrupted.losses[2:]  # without dropout nothing is drawn
    assert "the random states of 2 ranks, but this run has 1" in caplog.text
    loader = torch.utils.data.DataLoader([batch_of([[IGNORE_INDEX, 7, 8]])], batch_size=None)
    tiny_trainer(tmp_path, limit_val_batches=1.0).validate(build(), loader, ckpt_path=path, verbose=False)


def test_checkpoint_does_not_need_its_warm_start_folder(build, tmp_path):
    folder = save_adapter(build().model, tmp_path / "adapter")
    module = build(warm_start=str(folder))
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    fresh = GateRAModule(
        backbone=module.backbone,
        adapter=module.adapter,
        optimizer=OptimizerConfig(),
        warm_start=str(tmp_path / "gone"),
    )
    fresh.on_load_checkpoint(checkpoint)
    assert set(fresh.state_dict()) == set(checkpoint["state_dict"])
