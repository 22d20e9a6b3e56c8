"""Two training loops over the same tokenised rows: ours, and Hugging Face's with PEFT, each as its users run it."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning as L
import torch
import transformers
from datasets import Dataset
from mixed_rows import MixedRows
from torch import Tensor
from watch import Watch

from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.datamodules import Batch
from gatera_lightning.objectives.next_token import summed_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECIDED: dict[str, Any] = {
    "gate": TokenGateConfig(skip_below=0.1, merge_above=0.9)
}  # overlays/fast_decided.yaml
METHODS: dict[str, dict[str, Any]] = {
    "gatera": {},
    "gatera_decided": DECIDED,
    "hira": {"gate": "none"},
    "lora": {"gate": "none", "update": "lora"},
}
LEARNING_RATES = {"gatera": 1e-2, "gatera_decided": 1e-2, "hira": 1e-2, "lora": 2e-3}
"""The best of those that docs/results/quality.md tried."""


@dataclass(frozen=True)
class Settings:
    """What all contenders share."""

    backbone: str
    dtype: Any
    rows: int
    held_out: int
    batch_size: int
    rank: int

    @property
    def warmup(self) -> int:
        """Optimizer steps over which the learning rate rises: a tenth."""
        return max(1, math.ceil(self.rows / self.batch_size) // 10)

    def frozen(self) -> BackboneConfig:
        """The backbone."""
        return BackboneConfig(id=self.backbone, dtype=self.dtype)


@dataclass(frozen=True)
class Loop:
    """An adapted model, its epoch, and the loss by which it trains."""

    model: Any
    train: Callable[[Watch], int]
    """Once over the rows, watched; returns the optimizer steps that were taken."""

    loss: Callable[[Batch], Tensor]
    """Mean over the targets of a batch."""


def lightning_loop(method: str, data: MixedRows, settings: Settings, seed: int, accumulate: int = 1) -> Loop:
    """GateRAModule in Lightning's Trainer, as the smollm2 recipes set it up, without logger, checkpoints and validation."""
    L.seed_everything(seed, verbose=False)
    decided = method == "gatera_decided"
    module = GateRAModule(
        backbone=settings.frozen(),
        adapter=AdapterConfig(rank=settings.rank, **METHODS[method]),
        optimizer=OptimizerConfig(
            lr=LEARNING_RATES[method],
            warmup_steps=settings.warmup,
            gate_lr_multiplier=10.0 if decided else 1.0,
        ),
        gate_entropy_weight=0.1 if decided else 0.01,
    )
    module.configure_model()

    def train(watch: Watch) -> int:
        trainer = L.Trainer(
            accelerator="gpu" if DEVICE == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            callbacks=[
                L.pytorch.callbacks.LambdaCallback(on_train_epoch_start=watch.start, on_train_end=watch.stop)
            ],
            limit_val_batches=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=tempfile.mkdtemp(),
        )
        trainer.fit(module, datamodule=data)
        return trainer.global_step

    def loss(batch: Batch) -> Tensor:
        logits, targets, _ = module(batch)
        return summed_cross_entropy(logits, targets) / len(targets)

    return Loop(module.model, train, loss)


def hf_loop(method: str, data: MixedRows, settings: Settings, seed: int, sampling: str = "random") -> Loop:
    """PEFT's adapter in transformers.Trainer; clipping, AdamW and schedule are its defaults and the same as ours."""
    from peft import HiraConfig, LoraConfig, get_peft_model

    transformers.set_seed(seed)
    targets = AdapterConfig().target_modules
    adapter: Any = HiraConfig(r=settings.rank, target_modules=targets, task_type="CAUSAL_LM")
    if method == "lora":
        adapter = LoraConfig(
            r=settings.rank, lora_alpha=settings.rank, target_modules=targets, task_type="CAUSAL_LM"
        )
    model = get_peft_model(load_backbone(settings.frozen(), DEVICE), adapter)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=LEARNING_RATES[method],
            warmup_steps=settings.warmup,
            train_sampling_strategy=sampling,
            bf16=settings.dtype == "bfloat16",
            use_cpu=DEVICE == "cpu",
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(list(data.token_rows())),
        data_collator=transformers.DataCollatorForSeq2Seq(data.tokenizer),
    )
    trainer.remove_callback(transformers.PrinterCallback)

    def train(watch: Watch) -> int:
        trainer.add_callback(_Watched(watch))
        trainer.train()
        return trainer.state.global_step

    def loss(batch: Batch) -> Tensor:
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": batch["labels"],
        }
        return cast(Tensor, trainer.compute_loss(trainer.model_wrapped, inputs))

    return Loop(model, train, loss)


class _Watched(transformers.TrainerCallback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.watch.stop()


LOOPS: dict[str, Callable[[MixedRows, Settings, int], Loop]] = {
    "gatera": partial(lightning_loop, "gatera"),
    "hira": partial(lightning_loop, "hira"),
    "lora": partial(lightning_loop, "lora"),
    "hf_lora": partial(hf_loop, "lora"),
    "hf_hira": partial(hf_loop, "hira"),
    "gatera_decided": partial(lightning_loop, "gatera_decided"),
    "gatera_packed": partial(lightning_loop, "gatera"),  # it is the data that packs
    "gatera_mixed": partial(lightning_loop, "gatera", accumulate=4),  # and the data that mixes
    "lora_mixed": partial(lightning_loop, "lora", accumulate=4),
    "hf_lora_by_length": partial(hf_loop, "lora", sampling="group_by_length"),
}
