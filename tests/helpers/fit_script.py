"""One small training run in a process of its own, or in two: prints nothing, and writes what a test compares.

``python fit_script.py '{"backbone": FOLDER, "out": FOLDER, …}'``; :class:`Job` has the other settings. Rank 0
writes ``losses.json`` (hex floats, one per optimizer step), ``norms.json`` and ``logged_norms.json``
(gradient norms of update and gate), every rank writes ``ids_RANK.json`` and ``targets_RANK.json`` (per
micro-batch its example ids and its number of supervised tokens), and the adapter goes to ``out/adapter``.
"""

import io
import json
import os
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.tensor import DTensor

from gatera_lightning import AdapterConfig, GateRAModule, adapter_parameters, save_adapter
from gatera_lightning.adapters.gates import GATES
from gatera_lightning.backbone import BackboneConfig, load_tokenizer
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.callbacks.gate_histogram import GateHistogram
from gatera_lightning.callbacks.generated_samples import GeneratedSamples
from gatera_lightning.callbacks.safe_preempt import SafePreempt
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.checkpointing.integrity import newest_valid_checkpoint
from gatera_lightning.datamodules import Example, SupervisedDataModule
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import Preempted
from gatera_lightning.objectives import Objective, SelfDraft, Term, random_ids, self_draft
from gatera_lightning.objectives.training_loss import objectives_for
from gatera_lightning.training.optimizer import OptimizerConfig


@dataclass
class Job:
    backbone: str
    out: str
    strategy: str = "single"
    """single, ddp, fsdp, sharded (fsdp with sharded checkpoints), hsdp (2 × 1), offload (fsdp on the CPU)."""
    accumulate: int = 1
    checkpointing: bool = False
    backend: str | None = None
    """Backend of torch.compile, which then compiles the decoder layers."""
    clip: float | None = None
    dropout: float = 0.0
    update: str = "hira"
    gate: str = "token"
    adapter: dict = field(default_factory=dict)
    """Further settings of the adapter."""
    draw_seed: int | None = None
    """Seed of dropout and hard gates, plus the rank; None leaves what loading the model has left."""
    workers: int = 0
    epochs: int = 1
    dtype: str = "float64"
    attention: str = "sdpa"
    resume: str | None = None
    """A checkpoint; newest: the newest valid one in ``out``."""
    save_at: list[int] = field(default_factory=list)
    """Optimizer steps after which a checkpoint is written."""
    save_epoch_ends: bool = False
    kill_at: int | None = None
    """The process exits after this optimizer step without cleaning up."""
    poison: int | None = None
    """The loss of the micro-batch with this example id is NaN."""
    skip: int = 0
    """How many steps with a NaN may be skipped."""
    keep: bool = False
    """Write a checkpoint after every step, with AdapterCheckpoint."""
    slow_write: float = 0.0
    """Seconds that writing a checkpoint pauses when half of it is written."""
    preempt: bool = False
    """Exit with status 75 on SIGUSR1 and SIGTERM."""
    step_seconds: float = 0.0
    """Seconds that every micro-batch takes longer."""
    tuned: str | None = None
    """Folder of a trained adapter that is part of the frozen model."""
    tensorboard: bool = False
    """Write event files to ``out``."""


class RandomWords(SupervisedDataModule):
    """Thirty examples, 28 of them to train on, whose prompts and answers have very different lengths."""

    def examples(self, split):
        words = ["stone", "river", "lamp", "paper", "green", "cold"]
        words += ["hat", "boat", "seven", "winter", "garden", "loud"]

        def text(start, step, count):
            return " ".join(words[(start + k * step) % 12] for k in range(count))

        for i in range(30):
            prompt = f"Question: {text(5 * i, 1, 1 + (7 * i) % 9)}\nAnswer:"
            yield Example(prompt, [f" {text(i, 1, 1 + (5 * i) % 6)}"], 0, "made-up")


class Poison(Objective):
    """Adds a constant to the loss that is NaN for one example, and 0 otherwise."""

    @classmethod
    def of(cls, example):
        """Poison an example, which is no argument of the constructor: a resumed run must share those."""
        poison = cls()
        poison._example = example
        return poison

    def terms(self, model, batch, gates):
        value = float("nan") if self._example in batch["example_ids"] else 0.0
        return {"poison": Term(next(model.parameters()).new_tensor(value), 1)}


class SlowCheckpointIO(AtomicCheckpointIO):
    """Pauses when half of a checkpoint is written, where a kill would leave half a file."""

    seconds = 0.0

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        def save_in_halves(state, file):
            buffer = io.BytesIO()
            save(state, buffer)
            content = buffer.getvalue()
            file.write(content[: len(content) // 2])
            file.flush()
            time.sleep(self.seconds)
            file.write(content[len(content) // 2 :])

        save, torch.save = torch.save, save_in_halves
        try:
            super().save_checkpoint(checkpoint, path, storage_options)
        finally:
            torch.save = save


class Recorder(L.Callback):
    """Records losses, gradient norms and example ids, and saves, kills or slows the run as the job says."""

    def __init__(self, job):
        self.job, self.losses, self.ids, self.targets, self.norms, self.logged_norms = job, [], [], [], [], []

    def on_train_start(self, trainer, module):
        if self.job.draw_seed is not None:
            torch.manual_seed(self.job.draw_seed + trainer.global_rank)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        grads = [p.grad for p in adapter_parameters(module.model).values()]
        norm = torch.nn.utils.get_total_norm(grads)
        self.norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.ids.append(batch["example_ids"].tolist())
        self.targets.append(int((batch["labels"][:, 1:] != -100).sum()))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.losses.append(float(trainer.callback_metrics["train/loss"]).hex())
        self.logged_norms.append(
            [
                float(trainer.callback_metrics[f"grad_norm/{group}"])
                for group in ("update", "gate")
                if self.job.gate not in ("none", "position") or group != "gate"
            ]
        )
        if self.job.keep:  # one line per step, on the disk before the checkpoint of that step
            ids = self.ids[-trainer.accumulate_grad_batches :]
            with open(f"{self.job.out}/steps_{trainer.global_rank}.jsonl", "a") as file:
                file.write(json.dumps([trainer.global_step, self.losses[-1], ids]) + "\n")
        if trainer.global_step in self.job.save_at:
            trainer.save_checkpoint(f"{self.job.out}/step_{trainer.global_step}.ckpt")
        if trainer.global_step == self.job.kill_at:
            trainer.strategy.barrier()
            self.write(trainer)
            os._exit(9)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        time.sleep(self.job.step_seconds)

    def on_train_epoch_end(self, trainer, module):
        if self.job.save_epoch_ends:
            trainer.save_checkpoint(f"{self.job.out}/epoch_{trainer.current_epoch}.ckpt")

    def write(self, trainer):
        out = Path(self.job.out)
        if trainer.is_global_zero:
            (out / "losses.json").write_text(json.dumps(self.losses))
            (out / "norms.json").write_text(json.dumps(self.norms))
            (out / "logged_norms.json").write_text(json.dumps(self.logged_norms))
        (out / f"ids_{trainer.global_rank}.json").write_text(json.dumps(self.ids))
        (out / f"targets_{trainer.global_rank}.json").write_text(json.dumps(self.targets))


_GATE_SETTINGS = {
    "none": {},
    "static": {"bias": 0.3, "entropy_weight": 0.1},
    "token": {"bias": 0.3, "entropy_weight": 0.1},
    "hard": {"bias": 0.3, "sparsity_weight": 0.1, "gradient_share": 0.5},
    "threshold": {"sparsity_weight": 0.1},
    "position": {},
}


def draw_alike():
    """Let the draft rows of an example not depend on its micro-batch and its rank."""
    assert hasattr(self_draft, "_random_offsets")  # a name that has moved would patch nothing
    assert hasattr(random_ids, "_random_ids")
    self_draft._random_offsets = lambda labels, size: (labels == -100).sum(1) * 0 + 1
    random_ids._random_ids = lambda model, layout, generator=None: layout.columns * 7 % 50


def build_module(job):
    drafts = job.gate == "position"
    if drafts:
        draw_alike()
    gate = GATES[job.gate](**({} if drafts else {"lr_multiplier": 0.5}), **_GATE_SETTINGS[job.gate])
    dtype = "float64" if job.dtype == "float64" else "float32"
    poison = [] if job.poison is None else [Poison.of(job.poison)]
    adapter = AdapterConfig(
        update=job.update, rank=4, dropout=job.dropout, gate=gate, adapter_dtype=dtype, **job.adapter
    )
    return GateRAModule(
        backbone=BackboneConfig(
            job.backbone,
            None,
            job.dtype,
            job.attention,
            gradient_checkpointing=job.checkpointing,
            compile=job.backend is not None,
            adapter=job.tuned,
        ),
        adapter=adapter,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2, max_skipped_steps=job.skip),
        objectives=[*([SelfDraft([2])] if drafts else objectives_for(adapter)), *poison],
    )


def build_data(job):
    data = RandomWords(
        train_on="response",
        max_length=64,
        batch_size=8,
        eval_batch_size=4,
        token_budget=None,
        group_by_length=True,
        num_workers=job.workers,
        seed=1,
        held_out=2,
    )
    data.connect(load_tokenizer(BackboneConfig(job.backbone)))
    return data


def build_trainer(job, recorder):
    strategies = {
        "single": "auto",
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp": AdapterShardingStrategy(),
        "sharded": AdapterShardingStrategy(sharded_checkpoints=True),
        "hsdp": AdapterShardingStrategy(shard_size=1, replicate_size=2),
        "offload": AdapterShardingStrategy(shard_size=2, cpu_offload=True),
    }
    callbacks = [recorder, GateHistogram(3), *([SafePreempt()] if job.preempt else [])]
    if job.tensorboard:
        callbacks.append(GeneratedSamples(2, max_new_tokens=6))
    if job.keep:
        callbacks.append(AdapterCheckpoint(monitor=None, every_n_steps=1))
    SlowCheckpointIO.seconds = job.slow_write
    return L.Trainer(
        accelerator="cpu",
        devices=1 if job.strategy == "single" else 2,
        strategy=strategies[job.strategy],
        accumulate_grad_batches=job.accumulate,
        gradient_clip_val=job.clip,
        max_epochs=job.epochs,
        callbacks=callbacks,
        plugins=[SlowCheckpointIO()] if job.slow_write else [],
        default_root_dir=job.out,
        logger=TensorBoardLogger(job.out, name="", version="") if job.tensorboard else False,
        enable_checkpointing=job.keep,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def run(job: Job) -> Recorder:
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    if job.backend is not None:
        torch.compile = partial(torch.compile, backend=job.backend)
    module, data, recorder = build_module(job), build_data(job), Recorder(job)
    trainer = build_trainer(job, recorder)
    newest = job.resume == "newest"
    resume = newest_valid_checkpoint(Path(job.out) / "checkpoints") if newest else job.resume
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    recorder.write(trainer)
    save_adapter(module.model, Path(job.out) / "adapter")
    return recorder


if __name__ == "__main__":
    try:
        run(Job(**json.loads(sys.argv[1])))
    except Preempted as error:
        print(error)
        sys.exit(75)
