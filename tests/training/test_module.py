"""GateRAModule: equal to a plain loop, holding the adapter only, refusing what would train something else."""

import csv
import math
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fit_script import Job, Rows, run
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
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.backbone.loading import load_backbone, load_tokenizer
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.callbacks.throughput import Throughput
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import CheckpointError
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.objectives import linear_cross_entropy


def build(folder, **settings):
    adapter = AdapterConfig(**({"rank": 4, "gate": TokenGateConfig(bias=0.3)} | settings.pop("adapter", {})))
    backbone = BackboneConfig(id=str(folder), dtype="float32", **settings.pop("backbone", {}))
    module = GateRAModule(backbone=backbone, adapter=adapter, optimizer=OptimizerConfig(), **settings)
    module.configure_model()
    return module


def batch_of(labels, padding=()):
    labels = torch.tensor(labels)
    mask = torch.ones_like(labels)
    for row, start in padding:
        mask[row, start:] = 0
    return {
        "input_ids": torch.arange(labels.numel()).reshape(labels.shape) % 90 + 3,
        "attention_mask": mask,
        "labels": labels,
        "response_mask": labels != IGNORE_INDEX,
        "example_ids": torch.arange(len(labels)),
        "answer_ids": torch.zeros(len(labels), dtype=torch.long),
        "gold_ids": torch.zeros(len(labels), dtype=torch.long),
        "all_candidates_present": False,
        "step_supervised_tokens": int((labels[:, 1:] != IGNORE_INDEX).sum()),
        "step_tokens": int(mask.sum()),
    }


def twin_losses(folder, attention, epochs):
    """The training loop in plain PyTorch: one forward of the whole step, full logits, means, entropy from its definition."""
    backbone = BackboneConfig(id=str(folder), dtype="float64", attn_implementation=attention)
    model = load_backbone(backbone)
    config = AdapterConfig(rank=4, gate=TokenGateConfig(bias=0.3), adapter_dtype="float64")
    inject_adapters(model, config, torch.Generator().manual_seed(3))
    model.train()
    seen = {}
    for name, layer in adapted_linears(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))

    data = Rows(
        train_on="response", max_length=64, batch_size=8, eval_batch_size=4, token_budget=None, group_by_length=True,
        num_workers=0, seed=1, held_out=2,
    )  # fmt: skip
    data.connect(load_tokenizer(backbone))
    data.setup("fit")
    loader = data.train_dataloader()
    planned = loader.dataset
    parameters = adapter_parameters(model)
    gates = [p for name, p in parameters.items() if ".gate." in name]
    updates = [p for name, p in parameters.items() if ".gate." not in name]
    optimizer = torch.optim.AdamW(
        [{"params": updates, "lr": 1e-2}, {"params": gates, "lr": 5e-3}], weight_decay=0.0
    )
    peak = [group["lr"] for group in optimizer.param_groups]
    total, losses = epochs * len(planned), []
    for step in range(total):
        batch = planned[loader.order(step // len(planned))[step % len(planned)]]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        task = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )
        entropies = []
        for name, layer in adapted_linears(model).items():
            g = torch.sigmoid(seen[name] @ layer.gate.weight + layer.gate.bias)[batch["attention_mask"] > 0]
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
        ("capped", "eager", False, 1e-10),
    ],  # Gemma's norms are fp32 whatever the dtype
)
def test_losses_equal_a_plain_loop(backbone, attention, in_head, rel, request, tmp_path, monkeypatch):
    """Computed in the head, some positions at a time, and from logits that a model caps."""
    folder, shapes, summed = request.getfixturevalue(backbone), set(), linear_cross_entropy._of_chunk
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_PER_CHUNK", 4000)  # ten positions
    monkeypatch.setattr(
        linear_cross_entropy, "_of_chunk", lambda h, *rest: shapes.add(len(h)) or summed(h, *rest)
    )
    watched = run(Job(str(folder), str(tmp_path), accumulate=2, epochs=2, attention=attention))
    assert [float.fromhex(x) for x in watched.losses] == pytest.approx(
        twin_losses(folder, attention, 2), rel=rel
    )
    assert max(shapes, default=0) == (10 if in_head else 0)


@pytest.mark.parametrize("in_head", [True, False])
def test_no_target_tokens_is_no_nan(tiny_backbone, monkeypatch, in_head):
    module = build(tiny_backbone, gate_entropy_weight=0.0)
    if in_head:
        module.on_train_start()
    assert module._loss_is_in_head == in_head
    batch = batch_of([[IGNORE_INDEX] * 5, [IGNORE_INDEX] * 5])
    monkeypatch.setattr(
        module, "_trainer", L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    )
    loss = module.training_step(batch, 0)["loss"]
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is not None and not p.grad.any() for p in adapter_parameters(module.model).values())


def test_padding_changes_neither_loss_nor_entropy(tiny_backbone, monkeypatch):
    module = build(tiny_backbone, gate_entropy_weight=0.5)
    torch.manual_seed(0)
    for parameter in adapter_parameters(module.model).values():
        parameter.data.normal_(std=0.3)
    monkeypatch.setattr(
        module, "_trainer", L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    )
    short = batch_of([[IGNORE_INDEX, IGNORE_INDEX, 7, 8]])
    padded = {k: F.pad(v, (0, 3), value=IGNORE_INDEX if k == "labels" else 0) if v.ndim == 2 else v
              for k, v in short.items() if isinstance(v, torch.Tensor)}  # fmt: skip
    padded |= {"step_supervised_tokens": short["step_supervised_tokens"], "step_tokens": short["step_tokens"]}
    assert float(module.training_step(padded, 0)["loss"]) == pytest.approx(
        float(module.training_step(short, 0)["loss"]), rel=1e-5
    )


def test_state_dict_holds_the_adapter_only(tiny_backbone):
    module = build(tiny_backbone)
    assert set(module.state_dict()) == {f"model.{name}" for name in adapter_parameters(module.model)}


def test_backbone_is_in_training_mode_frozen_and_in_its_own_dtype(tiny_backbone):
    module = build(tiny_backbone, adapter={"dropout": 0.5})
    assert all(m.training for m in module.model.modules())
    adapter = {id(p) for p in adapter_parameters(module.model).values()}
    assert all(p.requires_grad == (id(p) in adapter) for p in module.model.parameters())


def test_configure_model_twice_keeps_the_model(tiny_backbone):
    module = build(tiny_backbone)
    model = module.model
    module.configure_model()
    assert module.model is model


def test_load_from_checkpoint_without_the_cli(tiny_backbone, tmp_path):
    run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", save_at=[2]))
    module = GateRAModule.load_from_checkpoint(tmp_path / "step_2.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "step_2.ckpt", weights_only=True)["state_dict"]
    assert module.adapter.rank == 4
    assert module.optimizer.gate_lr_multiplier == 0.5
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, saved[name])


def test_a_checkpoint_of_another_adapter_is_refused(tiny_backbone, tmp_path):
    run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", save_at=[2]))
    checkpoint = torch.load(tmp_path / "step_2.ckpt", weights_only=True)
    checkpoint["state_dict"].pop(next(iter(checkpoint["state_dict"])))
    with pytest.raises(CheckpointError, match="1 parameters are not in the file"):
        build(tiny_backbone).on_load_checkpoint(checkpoint)


def test_warm_start_takes_the_folder_s_values(tiny_backbone, tmp_path):
    first = build(tiny_backbone)
    for parameter in adapter_parameters(first.model).values():
        parameter.data.normal_()
    save_adapter(first.model, tmp_path / "adapter")
    second = build(tiny_backbone, warm_start=str(tmp_path / "adapter"))
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_mixed_precision_is_refused_before_weights_are_loaded(tiny_backbone, verb):
    module = tiny_module(tiny_backbone)
    trainer = L.Trainer(
        accelerator="cpu", precision="bf16-true", max_steps=1, logger=False, enable_checkpointing=False
    )
    with pytest.raises(ConfigError, match=r"trainer\.precision: bf16-true"):
        getattr(trainer, verb)(module, tiny_data(tiny_backbone))
    assert module.model is None


def test_a_validation_by_the_clock_is_refused(tiny_backbone):
    settings = {
        "max_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "val_check_interval": "00:00:10:00",
    }
    with pytest.raises(ConfigError, match=r"trainer\.val_check_interval: a time"):
        L.Trainer(accelerator="cpu", **settings).fit(
            tiny_module(tiny_backbone), [batch_of([[IGNORE_INDEX, 7, 8]])]
        )


def test_sharded_weights_are_never_gathered_in_inference_mode(tiny_backbone, tmp_path):
    """FSDP2 keeps what it gathers into, and a later fit could not be trained through it."""
    module = tiny_module(tiny_backbone)
    module.trainer = trainer = tiny_trainer(tmp_path, strategy=AdapterShardingStrategy())
    module.setup("test")
    assert not any(
        loop.inference_mode for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    )


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_fast_decoding_of_sharded_weights_is_refused(tiny_backbone, tmp_path, stage):
    module = tiny_module(tiny_backbone)
    module.decoding = DecodingConfig(skip_below=0.1)
    module.trainer = tiny_trainer(tmp_path, strategy=AdapterShardingStrategy())
    with pytest.raises(
        ConfigError, match=r"model\.decoding\.skip_below: 0\.1, merge_above: 1\.0, with sharded weights"
    ):
        module.setup(stage)


def test_a_checkpoint_of_another_program_is_named(tiny_backbone, tmp_path):
    torch.save(
        {"state_dict": {}, "global_step": 3, "loops": {}, "pytorch-lightning_version": "2.6.0"},
        tmp_path / "other.ckpt",
    )
    with pytest.raises(CheckpointError, match="none of an adapter; it lacks adapter, backbone"):
        tiny_trainer(tmp_path).test(
            tiny_module(tiny_backbone), tiny_data(tiny_backbone), ckpt_path=tmp_path / "other.ckpt"
        )


def test_a_run_that_failed_leaves_nothing_to_the_next(tiny_backbone, tmp_path):
    """As in a notebook: the same module, once its cause is repaired."""
    module, data = tiny_module(tiny_backbone), tiny_data(tiny_backbone)
    module.configure_model()
    first = next(iter(adapter_parameters(module.model).values()))
    whole = first.detach().clone()
    first.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError):
        tiny_trainer(tmp_path).fit(module, data)
    first.data.copy_(whole)
    trainer = tiny_trainer(tmp_path)
    trainer.fit(module, tiny_data(tiny_backbone))
    assert trainer.global_step > 1
    assert math.isfinite(trainer.callback_metrics["train/loss"])


def test_problems_are_collected():
    module = GateRAModule(
        backbone=BackboneConfig(id="./nowhere"),
        adapter=AdapterConfig(rank=0),
        optimizer=OptimizerConfig(lr=-1.0, schedule="cubic"),
        gate_entropy_weight=math.nan,
        warm_start="./nowhere",
    )
    found = "\n".join(module.problems())
    for name in (
        "backbone.id",
        "adapter.rank",
        "optimizer.lr",
        "optimizer.schedule",
        "gate_entropy_weight",
        "warm_start",
    ):
        assert f"model.{name}: " in found
    with pytest.raises(ConfigError):
        module.configure_model()


def test_a_poisoned_loss_stops_before_the_step_and_names_it(tiny_backbone, tmp_path):
    third_step = run(Job(str(tiny_backbone), str(tmp_path), dtype="float32")).ids[2]
    with pytest.raises(NonFiniteLossError, match="optimizer step 2 is nan") as caught:
        run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", poison=third_step[0]))
    assert str(sorted(third_step)) in str(caught.value)


@pytest.mark.parametrize("value", [torch.inf, 1e20])
def test_a_gradient_whose_square_is_not_finite_stops_before_the_step(
    tiny_backbone, tmp_path, monkeypatch, value
):
    """AdamW's second moment would be infinite for good."""

    def poison(self, *args):
        next(iter(adapter_parameters(self.model).values())).grad[0, 0] = value

    monkeypatch.setattr(GateRAModule, "on_after_backward", poison)
    with pytest.raises(NonFiniteLossError, match="the norm of its gradients inf"):
        run(Job(str(tiny_backbone), str(tmp_path), dtype="float32"))


def test_a_validation_with_a_nan_is_never_a_good_one(tiny_backbone):
    module = build(tiny_backbone)
    module.val_loss.update(torch.tensor(torch.nan), weight=5)
    module.val_loss.update(torch.tensor(2.0), weight=3)
    assert not math.isfinite(float(module.val_loss.compute()))


def test_a_module_that_was_validated_can_be_fitted(tiny_backbone, tmp_path):
    module, data = tiny_module(tiny_backbone), tiny_data(tiny_backbone)
    tiny_trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    trainer = tiny_trainer(tmp_path, max_steps=1, limit_val_batches=1.0, val_check_interval=1)
    trainer.fit(module, datamodule=data)
    fitted = trainer.callback_metrics["val/loss"]
    (again,) = tiny_trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert again["val/loss"] == pytest.approx(float(fitted))


class Validations(L.Callback):
    def __init__(self):
        self.steps = []

    def on_validation_end(self, trainer, module):
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_everything_of_a_step_is_logged_under_its_number(tiny_backbone, tmp_path, accumulate):
    """The module's numbers, those of callbacks and of validations after every micro-batch; epochs of three steps."""
    validations, logger = Validations(), CSVLogger(tmp_path)
    settings = {
        "limit_val_batches": 1,
        "val_check_interval": 1,
        "accumulate_grad_batches": accumulate,
        "logger": logger,
    }
    trainer = tiny_trainer(tmp_path, Throughput(1), validations, AdapterCheckpoint(), **settings)
    trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone, train=["everyday[:24]"]))
    with open(Path(logger.log_dir, "metrics.csv")) as file:
        rows = list(csv.DictReader(file))
    steps = {name: [int(row["step"]) for row in rows if row[name]] for name in rows[0]}
    for name in ("train/loss", "lr/gate", "grad_norm/update", "throughput/step_seconds"):
        assert steps[name] == [1, 2, 3, 4]
    assert steps["val/loss"] == validations.steps
    assert [float(row["epoch"]) for row in rows if row["train/loss"]] == [0, 0, 0, 1]
    assert all(row["epoch"] for row in rows if row["val/loss"])
    assert Path(trainer.checkpoint_callback.best_model_path).name == f"best-step={best_step(rows)}.ckpt"


def best_step(rows):
    """Where the validation loss was lowest."""
    return min((float(row["val/loss"]), int(row["step"])) for row in rows if row["val/loss"])[1]


def test_random_state_of_another_number_of_processes_is_said_to_be_lost(tiny_backbone, tmp_path, caplog):
    run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", save_at=[2]))
    path = tmp_path / "step_2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["RNGState"]["ranks"] *= 2
    torch.save(checkpoint, path)
    whole = run(Job(str(tiny_backbone), str(tmp_path), dtype="float32"))
    resumed = run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", resume=str(path)))
    assert resumed.losses == whole.losses[2:]  # without dropout nothing is drawn
    assert "the random state of 2 processes and this run has 1" in caplog.text
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.validate(
        build(tiny_backbone),
        torch.utils.data.DataLoader([batch_of([[IGNORE_INDEX, 7, 8]])], batch_size=None),
        ckpt_path=path,
        verbose=False,
    )


def test_a_checkpoint_outlives_the_folder_it_was_warm_started_from(tiny_backbone, tmp_path):
    module = build(tiny_backbone)
    folder = save_adapter(module.model, tmp_path / "adapter")
    module = build(tiny_backbone, warm_start=str(folder))
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
