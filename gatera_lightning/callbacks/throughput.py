"""Training speed, utilization of the device, and memory."""

import logging
import math
import time
from copy import deepcopy
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from gatera_lightning.callbacks.hardware import memory_bytes, peak_tflops
from gatera_lightning.cost_model.step_costs import MicroBatch, build_on_meta, step_flops
from gatera_lightning.datamodules.batching.datasets import TrainingBatches
from gatera_lightning.datamodules.batching.statistics import gold_lengths
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)


class Throughput(L.Callback):
    """Log speed and utilization of all ranks, and memory, under ``throughput/``.

    Values are averages since the last logging.

    - ``tokens_per_second``, ``target_tokens_per_second``: non-padding and supervised tokens per second.
    - ``step_seconds``: the time of an optimizer step, including the wait for data.
    - ``data_wait_seconds``: the time of a step between the end of one micro-batch and the start of the next.
      It also contains what other callbacks do there, such as writing a checkpoint.
    - ``model_tflops``: 10¹² FLOP/s that the non-padding tokens need in the forward and backward passes:
      without gradients of frozen weights, with the head at supervised tokens only, and without recomputation.
      The FLOPs are counted once, for the mean micro-batch, as by ``estimate``. Tokens that ``skip_below`` and
      ``merge_above`` make cheaper count in full.
    - ``model_flops_utilization``: ``model_tflops`` as a share of what the devices can do in the backbone's
      dtype. Missing if that is unknown, as on a CPU or in float32.
    - ``memory_gib``: of rank 0. On CUDA, the peak memory of tensors since the last logging; elsewhere the
      current resident memory of the process, where the system reports it.

    Validation does not count. Measuring never waits for the device.

    Example:
        >>> trainer = Trainer(callbacks=[Throughput(every_n_steps=50)])
    """

    def __init__(self, every_n_steps: int = 10, peak_tflops: float | None = None) -> None:
        """Log training speed, utilization and memory.

        Args:
            every_n_steps: Optimizer steps between two measurements; 0 turns them off. A small number gives
                noisier values.
            peak_tflops: What one device can do in the backbone's dtype, in 10¹² dense FLOP/s; null looks it
                up in a table of GPUs, which covers bfloat16 and float16.

        Raises:
            ValueError: ``every_n_steps`` is negative, or ``peak_tflops`` is not a positive finite number.
        """
        if every_n_steps < 0:
            raise ValueError(
                f"throughput.every_n_steps: {every_n_steps}; accepted: at least 1, or 0 for never"
            )
        if peak_tflops is not None and not 0 < peak_tflops < math.inf:
            raise ValueError(f"throughput.peak_tflops: {peak_tflops}; accepted: a number above 0, or null")
        self.every_n_steps = every_n_steps
        self.peak_tflops = peak_tflops
        self._logged: dict[str, float] = {}
        self._flops_per_token: float | None = None
        self._peak_flops: float | None = None
        self._since = 0.0
        self._step = 0
        self._reset()

    def _reset(self) -> None:
        self._seconds = self._waited = 0.0
        self._steps = self._tokens = self._supervised_tokens = 0

    @property
    def tokens_per_second(self) -> float | None:
        """The speed since the last logging; right after it, the logged speed; None before the first step."""
        return (
            self._tokens / self._seconds if self._tokens else self._logged.get("throughput/tokens_per_second")
        )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reset()
        self._logged = {}
        if self.every_n_steps and trainer.loggers and trainer.is_global_zero:
            module: Any = pl_module
            self._flops_per_token = _flops_per_token(module, trainer.train_dataloader.dataset)  # type: ignore[union-attr]
            dtype = module.model.get_input_embeddings().weight.dtype
            peak = self.peak_tflops or peak_tflops(module.device, dtype)
            self._peak_flops = 1e12 * peak if peak else None
        self._reset_peak_memory(pl_module.device)
        self._since, self._step = time.perf_counter(), trainer.global_step

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += self._lap()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._lap()
        if trainer.global_step == self._step:
            return  # the optimizer step is not complete yet
        self._step = trainer.global_step
        self._steps += 1
        self._tokens += batch["step_tokens"]
        self._supervised_tokens += batch["step_supervised_tokens"]
        if self.every_n_steps and self._step % self.every_n_steps == 0:
            self._logged = self._measure(trainer.world_size, pl_module.device)
            for logger in trainer.loggers:
                logger.log_metrics(self._logged, step=self._step)
            self._reset()
            self._reset_peak_memory(pl_module.device)

    def _lap(self) -> float:
        """Add the time since the last call to the total, and return it."""
        now = time.perf_counter()
        lap, self._since = now - self._since, now
        self._seconds += lap
        return lap

    def _measure(self, devices: int, device: torch.device) -> dict[str, float]:
        rate = self._tokens / self._seconds
        found = {
            "tokens_per_second": rate,
            "target_tokens_per_second": self._supervised_tokens / self._seconds,
            "step_seconds": self._seconds / self._steps,
            "data_wait_seconds": self._waited / self._steps,
        }
        if self._flops_per_token is not None:
            found["model_tflops"] = rate * self._flops_per_token / 1e12
            if self._peak_flops:
                found["model_flops_utilization"] = rate * self._flops_per_token / (devices * self._peak_flops)
        if (memory := memory_bytes(device)) is not None:
            found["memory_gib"] = memory / 2**30
        return {f"throughput/{name}": value for name, value in found.items()}

    def _reset_peak_memory(self, device: torch.device) -> None:
        if self.every_n_steps and device.type == "cuda":  # if turned off, leave the counter to other users
            torch.cuda.reset_peak_memory_stats(device)


def mean_micro_batch(batches: TrainingBatches) -> MicroBatch:
    """Return the mean micro-batch of a batch schedule without padding, as sequences of one length.

    It has the schedule's mean numbers of tokens, of supervised tokens and of squared sequence lengths.
    """
    lengths = gold_lengths(batches.table.examples)
    used = [lengths[i] for step in batches.steps for examples in step.micro_batches for i in examples]
    tokens = sum(used)
    supervised_tokens = sum(step.supervised_tokens for step in batches.steps)
    # Attention costs Σ n² over the sequences: the common length n̄ has to satisfy tokens · n̄ = Σ n².
    length = round(sum(n * n for n in used) / tokens)
    micro_batches = sum(len(step.micro_batches) for step in batches.steps)
    sequences = max(1, round(tokens / micro_batches / length))
    return MicroBatch(sequences, length, max(1, round(sequences * length * supervised_tokens / tokens)))


def _flops_per_token(module: Any, batches: TrainingBatches) -> float | None:
    """The mean FLOPs of training one non-padding token; None, with a warning, if they cannot be counted."""
    batch = mean_micro_batch(batches)
    backbone = replace(module.backbone, gradient_checkpointing=False)
    try:
        # Initializing the copy must not advance the run's random state.
        with torch.random.fork_rng(devices=[]):
            model = build_on_meta(deepcopy(module.model.config), backbone, module.adapter, torch.bfloat16)
            flops = sum(step_flops(model, batch, objectives=module.objectives))
    except ConfigError as error:
        log.warning("throughput: model_tflops is not logged, because the FLOPs cannot be counted (%s)", error)
        return None
    return flops / batch.tokens
