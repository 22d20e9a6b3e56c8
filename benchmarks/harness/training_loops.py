"""Two training loops over the same tokenized examples: ours, and Hugging Face's with PEFT."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning as L
import transformers
from datasets import Dataset
from torch import Tensor

from benchmarks.harness.fitting import bare_trainer
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.mixed_examples import MixedExamples
from benchmarks.harness.monitoring import LoopMonitor
from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.datamodules import Batch
from gatera_lightning.objectives.next_token import summed_cross_entropy

SATURATED = TokenGateConfig(lr_multiplier=10.0, entropy_weight=0.1, skip_below=0.1, merge_above=0.9)
"""The gate of overlays/hardware/fast_saturated.yaml."""

METHODS: dict[str, dict[str, Any]] = {
    "gatera": {},
    "gatera_saturated": {"gate": SATURATED},
    "hira": {"gate": "none"},
    "lora": {"gate": "none", "update": "lora"},
}
LEARNING_RATES = {"gatera": 1e-2, "gatera_saturated": 1e-2, "hira": 1e-2, "lora": 2e-3}
"""The best of those that docs/results/quality.md tried."""


@dataclass(frozen=True)
class LoopSettings:
    """What all contenders share."""

    backbone: str
    dtype: Any
    train_examples: int
    validation_examples: int
    batch_size: int
    rank: int

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps over which the learning rate rises: a tenth."""
        return max(1, math.ceil(self.train_examples / self.batch_size) // 10)

    def backbone_config(self) -> BackboneConfig:
        """Return the settings of the backbone."""
        return BackboneConfig(id=self.backbone, dtype=self.dtype)


@dataclass(frozen=True)
class TrainingLoop:
    """An adapted model, and how it is trained."""

    model: Any

    train: Callable[[LoopMonitor], int]
    """Trains for one epoch, monitored, and returns the number of optimizer steps."""

    loss: Callable[[Batch], Tensor]
    """The loss that is trained, without the entropy term: the mean over a batch's supervised tokens."""


def lightning_loop(
    method: str, data: MixedExamples, settings: LoopSettings, seed: int, accumulate: int = 1
) -> TrainingLoop:
    """Return GateRAModule in Lightning's Trainer, with the settings of the smollm2 recipes."""
    L.seed_everything(seed, verbose=False)
    module = GateRAModule(
        backbone=settings.backbone_config(),
        adapter=AdapterConfig(rank=settings.rank, **METHODS[method]),
        optimizer=OptimizerConfig(lr=LEARNING_RATES[method], warmup_steps=settings.warmup_steps),
    )
    module.configure_model()

    def train(monitor: LoopMonitor) -> int:
        callback = L.pytorch.callbacks.LambdaCallback(
            on_train_epoch_start=monitor.start, on_train_end=monitor.stop
        )
        trainer = bare_trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[callback])
        trainer.fit(module, datamodule=data)
        return trainer.global_step

    def loss(batch: Batch) -> Tensor:
        found = module(batch)
        return summed_cross_entropy(found.logits, found.labels) / len(found.labels)

    return TrainingLoop(module.model, train, loss)


def hugging_face_loop(
    method: str, data: MixedExamples, settings: LoopSettings, seed: int, sampling: str = "random"
) -> TrainingLoop:
    """Return PEFT in transformers.Trainer, whose defaults for clipping, AdamW and schedule are ours."""
    from peft import HiraConfig, LoraConfig, get_peft_model

    transformers.set_seed(seed)
    targets = AdapterConfig().target_modules
    adapter: Any = HiraConfig(r=settings.rank, target_modules=targets, task_type="CAUSAL_LM")
    if method == "lora":
        adapter = LoraConfig(
            r=settings.rank, lora_alpha=settings.rank, target_modules=targets, task_type="CAUSAL_LM"
        )
    model = get_peft_model(load_backbone(settings.backbone_config(), DEVICE), adapter)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=LEARNING_RATES[method],
            warmup_steps=settings.warmup_steps,
            train_sampling_strategy=sampling,
            bf16=settings.dtype == "bfloat16",
            use_cpu=DEVICE == "cpu",
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(list(data.token_lists())),
        data_collator=transformers.DataCollatorForSeq2Seq(data.tokenizer),
    )
    trainer.remove_callback(transformers.PrinterCallback)

    def train(monitor: LoopMonitor) -> int:
        trainer.add_callback(_MonitorCallback(monitor))
        trainer.train()
        return trainer.state.global_step

    def loss(batch: Batch) -> Tensor:
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": batch["labels"],
        }
        return cast(Tensor, trainer.compute_loss(trainer.model_wrapped, inputs))

    return TrainingLoop(model, train, loss)


class _MonitorCallback(transformers.TrainerCallback):
    def __init__(self, monitor: LoopMonitor) -> None:
        self.monitor = monitor

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.monitor.start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.monitor.stop()


LOOPS: dict[str, Callable[[MixedExamples, LoopSettings, int], TrainingLoop]] = {
    "gatera": partial(lightning_loop, "gatera"),
    "hira": partial(lightning_loop, "hira"),
    "lora": partial(lightning_loop, "lora"),
    "hf_lora": partial(hugging_face_loop, "lora"),
    "hf_hira": partial(hugging_face_loop, "hira"),
    "gatera_saturated": partial(lightning_loop, "gatera_saturated"),
    "gatera_packed": partial(lightning_loop, "gatera"),  # the data module packs
    "gatera_mixed": partial(lightning_loop, "gatera", accumulate=4),  # the data module mixes lengths
    "lora_mixed": partial(lightning_loop, "lora", accumulate=4),
    "hf_lora_by_length": partial(hugging_face_loop, "lora", sampling="group_by_length"),
}
