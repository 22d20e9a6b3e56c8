"""Hugging Face's Trainer and TRL's SFTTrainer with gated adapters: losses, entropy term, resume."""

import lightning as L
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_backbone import tiny_data, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from gatera_lightning import adapter_parameters, load_adapter
from gatera_lightning.peft import GateEntropyMixin, GateRAConfig

STEPS, ROWS = 20, 8


class GatedTrainer(GateEntropyMixin, Trainer):
    pass


class _Recorder(L.Callback):
    """Keeps the adapter before training, and the loss and the rows of every step."""

    def __init__(self):
        self.losses, self.entropies, self.rows = [], [], []

    def on_fit_start(self, trainer, module):
        self.start = [p.detach().clone() for p in adapter_parameters(module.model).values()]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.logged_metrics["train/loss"]))
        self.entropies.append(float(trainer.logged_metrics.get("train/gate_entropy", 0)))
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
        ):
            self.rows.append({"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()})


@pytest.fixture(scope="module")
def ours(tiny_backbone, tmp_path_factory):
    """Train 20 steps with Lightning for a gate, once each; return the recorder."""
    found = {}

    def train(gate, update="hira"):
        if (gate, update) not in found:
            recorder = _Recorder()
            module = tiny_module(tiny_backbone, gate=gate, update=update, entropy_weight=0.5)
            module.optimizer.schedule = "constant"
            root = tmp_path_factory.mktemp("ours")
            trainer = tiny_trainer(root, recorder, max_steps=STEPS)
            trainer.fit(module, datamodule=tiny_data(tiny_backbone, batch_size=ROWS))
            recorder.end = [p.detach().clone() for p in adapter_parameters(module.model).values()]
            found[gate, update] = recorder
        return found[gate, update]

    return train


def _config(gate, update="hira"):
    settings = {"kind": gate} | ({"entropy_weight": 0.5} if gate in ("static", "token") else {})
    return GateRAConfig(update=update, gate=settings, r=4, task_type="CAUSAL_LM")


def _arguments(folder, **settings):
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    return defaults | settings


def _collate(rows):
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key, fill):
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def _set(model, values):
    with torch.no_grad():
        for parameter, value in zip(adapter_parameters(model).values(), values, strict=True):
            parameter.copy_(value)


def _logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _gated_trainer(tiny_backbone, recorder, folder, gate="token", update="hira", **settings):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_backbone), _config(gate, update))
    _set(model, recorder.start)
    arguments = TrainingArguments(**_arguments(folder, **settings))
    rows = Dataset.from_list(recorder.rows)
    return GatedTrainer(model=model, args=arguments, train_dataset=rows, data_collator=_collate)


def _assert_equal(found, expected, tolerance=1e-5):
    assert len(found) == len(expected) == STEPS
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= tolerance


@pytest.mark.parametrize("gate", ["none", "static", "token"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_trainer_has_our_losses(tiny_backbone, ours, tmp_path, gate, accumulate):
    recorder = ours(gate)
    trainer = _gated_trainer(
        tiny_backbone,
        recorder,
        tmp_path,
        gate,
        per_device_train_batch_size=ROWS // accumulate,
        gradient_accumulation_steps=accumulate,
    )
    trainer.train()
    _assert_equal(_logged(trainer, "loss"), recorder.losses)
    if gate != "none":
        _assert_equal(_logged(trainer, "gate_entropy"), recorder.entropies)
    for parameter, expected in zip(adapter_parameters(trainer.model).values(), recorder.end, strict=True):
        assert torch.allclose(parameter, expected, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "update"), [("none", "lora"), ("token", "hira"), ("token", "dora")])
def test_sft_trainer_has_our_losses(tiny_backbone, ours, tmp_path, gate, update):
    trl = pytest.importorskip("trl", reason="needs the package trl")

    class GatedSFTTrainer(GateEntropyMixin, trl.SFTTrainer):
        pass

    recorder = ours(gate, update)
    trainer = GatedSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_backbone),
        args=trl.SFTConfig(**_arguments(tmp_path, gradient_checkpointing=False)),
        train_dataset=Dataset.from_list(recorder.rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_backbone),
        peft_config=_config(gate, update),
    )
    _set(trainer.model, recorder.start)
    trainer.train()
    _assert_equal(_logged(trainer, "loss"), recorder.losses)


def test_sft_trainer_runs_with_defaults_and_saves_our_folder(tiny_backbone, ours, tmp_path):
    trl = pytest.importorskip("trl", reason="needs the package trl")
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_backbone),
        args=trl.SFTConfig(**_arguments(tmp_path, max_steps=2)),  # gradient checkpointing is on
        train_dataset=Dataset.from_list(ours("token").rows[:16]),
        processing_class=AutoTokenizer.from_pretrained(tiny_backbone),
        peft_config=GateRAConfig(r=4),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    load_adapter(model, tmp_path / "adapter")
    values = [p.detach() for p in adapter_parameters(trainer.model).values()]
    assert all(torch.equal(p, v) for p, v in zip(adapter_parameters(model).values(), values, strict=True))


def test_threshold_gates_have_sparsity_rate_and_range(tiny_backbone, ours, tmp_path):
    """The gates' learning rate is a tenth, and the mean openness is a part of the loss."""
    recorder = ours("threshold", "lora")
    trainer = _gated_trainer(tiny_backbone, recorder, tmp_path, "threshold", "lora")
    trainer.train()
    _assert_equal(_logged(trainer, "loss"), recorder.losses)
    assert len(_logged(trainer, "gate_openness")) == STEPS
    updates, gates = (group for group in trainer.optimizer.param_groups if group["params"])
    assert gates["initial_lr"] == updates["initial_lr"] / 10
    ends = zip(adapter_parameters(trainer.model).items(), recorder.end, strict=True)
    found = {name: (value.detach(), end) for (name, value), end in ends if "threshold" in name}
    assert found
    assert any(bool(value > 0) for value, _ in found.values())
    for value, end in found.values():
        torch.testing.assert_close(value, end, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        next(iter(found.values()))[0].fill_(-1.0)
    trainer.optimizer.step()
    assert all(bool(value >= 0) for value, _ in found.values())


def test_second_training_keeps_the_rates(tiny_backbone, ours, tmp_path):
    trainer = _gated_trainer(tiny_backbone, ours("threshold", "lora"), tmp_path, "threshold", "lora")
    trainer.args.max_steps = 1
    trainer.train()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == rates


def test_entropy_is_left_out_of_evaluation(tiny_backbone, ours, tmp_path):
    recorder = ours("token")
    trainer = _gated_trainer(tiny_backbone, recorder, tmp_path)
    rows = Dataset.from_list(recorder.rows[:ROWS])
    plain = Trainer(model=trainer.model, args=trainer.args, data_collator=_collate)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(plain.evaluate(rows)["eval_loss"])


@pytest.mark.slow
def test_trainer_resumes(tiny_backbone, ours, tmp_path):
    recorder = ours("token")
    whole = _gated_trainer(tiny_backbone, recorder, tmp_path / "whole")
    whole.train()
    first = _gated_trainer(
        tiny_backbone, recorder, tmp_path / "parts", max_steps=10, save_strategy="steps", save_steps=10
    )
    first.train()
    second = _gated_trainer(tiny_backbone, recorder, tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-10"))
    assert _logged(second, "loss")[-10:] == _logged(whole, "loss")[-10:]
    for one, other in zip(
        adapter_parameters(second.model).values(), adapter_parameters(whole.model).values(), strict=True
    ):
        assert torch.equal(one, other)
    folder = tmp_path / "parts" / "checkpoint-10"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_backbone), folder)
    load_adapter(AutoModelForCausalLM.from_pretrained(tiny_backbone), folder)
