"""How fast, of what the machine can do, and in how much memory."""

import logging
import math
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from gatera_lightning.cost_model.step_costs import MicroBatch, build_on_meta, step_flops
from gatera_lightning.datamodules.batching.datasets import TrainingBatches
from gatera_lightning.datamodules.batching.statistics import right_lengths
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)

PEAK_TFLOPS = {
    "NVIDIA A10": 125,
    "NVIDIA A30": 165,
    "NVIDIA A40": 149.7,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 120GB": 989,
    "NVIDIA GH200 480GB": 989,
}
"""10¹² operations a second in bf16 or fp16, without sparsity, as NVIDIA states them, by the name that the driver gives.

Names are matched whole: a slice of a GPU (MIG) has a longer one. Lightning's table takes an L40S for an L4.
"""


class Throughput(L.Callback):
    """Logs what a run makes of its time, of the whole job and on average since the last reading, under ``throughput/``.

    - ``tokens_per_second``, ``target_tokens_per_second``: padding not counted, by the plan's totals.
    - ``step_seconds``: of an optimizer step, waiting for data included.
    - ``data_wait_seconds``: of a step, between the end of a micro-batch and the beginning of the next; what other callbacks do
      there, such as writing a checkpoint, counts too.
    - ``model_tflops``: 10¹² operations a second that the model's real tokens need, forward and backward as they are trained:
      no gradients of frozen weights, the head at target tokens only, nothing that is recomputed. Counted by ``costs.py``, as
      ``plan`` does, once, for the mean micro-batch; what ``skip_below`` and ``merge_above`` leave out counts as done.
    - ``model_flops_utilization``: that, of what the devices could do at the backbone's dtype; left out where neither
      ``peak_tflops`` nor the table of GPUs above says it, as on a CPU or in float32.
    - ``memory_gib``: of the first process. On CUDA the most that tensors took since the last reading; elsewhere the memory that
      the process holds at that moment (VmRSS), left out where there is no /proc.

    Validation does not count. Nothing here waits for the device.
    """

    def __init__(self, every_n_steps: int = 10, peak_tflops: float | None = None) -> None:
        """Measure speed.

        Args:
            every_n_steps: Optimizer steps between two readings; 0 switches them off.
            peak_tflops: What one device can do at the backbone's dtype, in 10¹² dense operations a second; null takes it from
                the table of GPUs, which knows bfloat16 and float16.
        """
        if every_n_steps < 0:
            raise ValueError(
                f"throughput.every_n_steps: {every_n_steps}; accepted: at least 1, or 0 for never"
            )
        if peak_tflops is not None and not 0 < peak_tflops < math.inf:
            raise ValueError(f"throughput.peak_tflops: {peak_tflops}; accepted: a number above 0, or null")
        self.every_n_steps = every_n_steps
        self.peak_tflops = peak_tflops
        self._reading: dict[str, float] = {}
        self._flops_per_token: float | None = None
        self._peak_flops: float | None = None
        self._since = 0.0
        self._step = 0
        self._restart()

    def _restart(self) -> None:
        self._seconds = self._waited = 0.0
        self._steps = self._tokens = self._targets = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Since the last reading, or where nothing was done since, of that; None before the first step."""
        return (
            self._tokens / self._seconds
            if self._tokens
            else self._reading.get("throughput/tokens_per_second")
        )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart()
        self._reading = {}
        if self.every_n_steps and trainer.loggers and trainer.is_global_zero:
            module: Any = pl_module
            self._flops_per_token = _flops_per_token(module, trainer.train_dataloader.dataset)  # type: ignore[union-attr]
            peak = self.peak_tflops or _peak_tflops(
                module.device, module.model.get_input_embeddings().weight.dtype
            )
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
            return  # in the middle of an accumulated step
        self._step = trainer.global_step
        self._steps += 1
        self._tokens += batch["step_tokens"]
        self._targets += batch["step_supervised_tokens"]
        if self.every_n_steps and self._step % self.every_n_steps == 0:
            self._reading = self._read(trainer.world_size, pl_module.device)
            for logger in trainer.loggers:
                logger.log_metrics(self._reading, step=self._step)
            self._restart()
            self._reset_peak_memory(pl_module.device)

    def _lap(self) -> float:
        """Count the time since the last look; its seconds."""
        now = time.perf_counter()
        lap, self._since = now - self._since, now
        self._seconds += lap
        return lap

    def _read(self, devices: int, device: torch.device) -> dict[str, float]:
        rate = self._tokens / self._seconds
        found = {
            "tokens_per_second": rate,
            "target_tokens_per_second": self._targets / self._seconds,
            "step_seconds": self._seconds / self._steps,
            "data_wait_seconds": self._waited / self._steps,
        }
        if self._flops_per_token is not None:
            found["model_tflops"] = rate * self._flops_per_token / 1e12
            if self._peak_flops:
                found["model_flops_utilization"] = rate * self._flops_per_token / (devices * self._peak_flops)
        if (memory := _memory(device)) is not None:
            found["memory_gib"] = memory / 2**30
        return {f"throughput/{name}": value for name, value in found.items()}

    def _reset_peak_memory(self, device: torch.device) -> None:
        if self.every_n_steps and device.type == "cuda":  # switched off, it leaves the counter to others
            torch.cuda.reset_peak_memory_stats(device)


def _flops_per_token(module: Any, batches: TrainingBatches) -> float | None:
    """Operations that a real token needs in training, on average over a plan; None, and it says why, if none can be counted."""
    batch = mean_micro_batch(batches)
    backbone = replace(module.backbone, gradient_checkpointing=False)
    try:
        with torch.random.fork_rng(
            devices=[]
        ):  # the copy's initial values must not move the run's random numbers
            model = build_on_meta(deepcopy(module.model.config), backbone, module.adapter, torch.bfloat16)
            flops = sum(step_flops(model, batch))
    except ConfigError as error:
        log.warning("throughput: no operations a second, for they cannot be counted (%s)", error)
        return None
    return flops / (batch.rows * batch.tokens)


def mean_micro_batch(batches: TrainingBatches) -> MicroBatch:
    """The mean micro-batch of a plan without padding, as rows of one length: as many tokens, targets and squared lengths."""
    lengths = right_lengths(batches.table.rows)
    used = [lengths[row] for step in batches.steps for rows in step.micro_batches for row in rows]
    tokens = sum(used)
    length = round(
        sum(n * n for n in used) / tokens
    )  # attention costs Σ n²: the length at which that is tokens · length
    rows = max(1, round(tokens / sum(len(step.micro_batches) for step in batches.steps) / length))
    return MicroBatch(
        rows, length, max(1, round(rows * length * sum(step.targets for step in batches.steps) / tokens))
    )


def _peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the table has of a device."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(device))


def _memory(device: torch.device) -> int | None:
    """Bytes: the peak of what tensors took on a GPU, or what this process holds of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)
