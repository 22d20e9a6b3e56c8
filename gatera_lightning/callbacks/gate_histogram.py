"""Gates over time: a histogram per adapted layer, prompt and response tokens apart."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from gatera_lightning.adapters.inject import adapted_linears
from gatera_lightning.datamodules.tokens import Batch
from gatera_lightning.losses import gate_entropy

BINS = 50
CLOSED, OPEN = 0.1, 0.9
PHASES = ("prompt", "response")


class GateCounts:
    """Counts of g in 50 equal bins, and sums of g, of H and of g², per phase and layer.

    Everything stays on the device; one pass over the stacked logits of all layers, no synchronisation.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.bins = torch.zeros(len(PHASES), layers, BINS, dtype=torch.long, device=device)
        self.sums = torch.zeros(3, len(PHASES), layers, device=device)  # Σg, ΣH, Σg²

    def update(self, z: Tensor, batch: Batch) -> None:
        """Add the logits (layers, batch, tokens) of one forward; padding and empty rows count nowhere."""
        real = batch["attention_mask"] > 0
        if "position_ids" not in batch:  # packed lines hold rows of training, all of which count
            real &= (batch["example_ids"] >= 0).unsqueeze(1)
        z = torch.nan_to_num(z)  # a diverged step is stopped by its loss, not by its picture
        g, entropy = torch.sigmoid(z.float()), gate_entropy(z.float())
        index = (g * BINS).long().clamp_(max=BINS - 1)
        for phase, mask in enumerate((real & ~batch["response_mask"], real & batch["response_mask"])):
            weight = mask.to(g.dtype).expand_as(g)  # (layers, batch, tokens)
            self.bins[phase].scatter_add_(1, index.flatten(1), mask.long().expand_as(index).flatten(1))
            self.sums[0, phase] += (g * weight).sum((1, 2))
            self.sums[1, phase] += (entropy * weight).sum((1, 2))
            self.sums[2, phase] += (g * g * weight).sum((1, 2))


class GateHistogram(L.Callback):
    """Every ``every_n_steps`` optimizer steps, what the gates did since the last time.

    TensorBoard histograms ``gates/<layer>/prompt`` and ``…/response``; scalars ``gates/<phase>/mean``,
    ``share_closed`` (g < 0.1), ``share_open`` (g > 0.9) and ``entropy`` over all layers and, under
    ``gate_layers/<layer>/<phase>/``, per layer. Counts are summed over ranks. With a logger other than TensorBoard the
    scalars are kept and the histograms skipped, with one line; without gates there is nothing to do.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        """Watch the gates.

        Args:
            every_n_steps: Optimizer steps between two histograms; 0 switches them off.
        """
        if every_n_steps < 0:
            raise ValueError(f"gate_histogram.every_n_steps: {every_n_steps}; accepted: at least 1, or 0 for never")
        self.every_n_steps = every_n_steps
        self.counts: GateCounts | None = None
        self.names: list[str] = []
        self._logged_step = 0
        self._restored: dict[str, Any] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was counted since the last histogram, over all processes; a collective."""
        if self.counts is None:
            return {"logged_step": self._logged_step}
        sums, bins = self.counts.sums.clone(), self.counts.bins.clone()
        if torch.distributed.is_initialized():
            for part in (sums, bins):
                torch.distributed.all_reduce(part)
        return {"logged_step": self._logged_step, "names": self.names, "bins": bins.cpu(), "sums": sums.cpu()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting: rank 0 with all that was counted, the others from nothing."""
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._logged_step = self._restored.get("logged_step", trainer.global_step)
        if "bins" in self._restored:
            bins, sums = self._restored["bins"].to(pl_module.device), self._restored["sums"].to(pl_module.device)
            self.names, self.counts = self._restored["names"], GateCounts(bins.shape[1], pl_module.device)
            if trainer.is_global_zero:
                self.counts.bins += bins
                self.counts.sums += sums
        self._restored = {}
        module: Any = pl_module
        gated = any(layer.gate is not None for layer in adapted_linears(module.model).values())
        tensorboard = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        if gated and self.every_n_steps and trainer.loggers and not tensorboard and trainer.is_global_zero:
            print("gate histograms need the TensorBoard logger: keeping the scalars, skipping the pictures")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.every_n_steps or outputs.get("gate_logits") is None:
            return
        z = outputs["gate_logits"]  # (layers, batch, tokens)
        if self.counts is None:
            self.counts = GateCounts(len(z), z.device)
            self.names = outputs["gate_names"]  # in the order in which the layers ran, as the logits are
        self.counts.update(z, batch)
        if trainer.global_step > self._logged_step and trainer.global_step % self.every_n_steps == 0:
            self._logged_step = trainer.global_step
            self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        """Sum the counts over ranks, write them, and start anew."""
        assert self.counts is not None
        bins = trainer.strategy.reduce(self.counts.bins, reduce_op="sum").cpu().double()
        sums = trainer.strategy.reduce(self.counts.sums, reduce_op="sum").cpu().double()
        self.counts = None
        if not trainer.is_global_zero:
            return
        scalars: dict[str, float] = {}
        for phase, phase_name in enumerate(PHASES):
            scalars |= _statistics(f"gates/{phase_name}", bins[phase].sum(0), sums[:, phase].sum(1))
            for layer, name in enumerate(self.names):
                scalars |= _statistics(f"gate_layers/{name}/{phase_name}", bins[phase, layer], sums[:, phase, layer])
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                for phase, phase_name in enumerate(PHASES):
                    for layer, name in enumerate(self.names):
                        _add_histogram(
                            logger, f"gates/{name}/{phase_name}", bins[phase, layer], sums[:, phase, layer], trainer.global_step
                        )


def _statistics(prefix: str, bins: Tensor, sums: Tensor) -> dict[str, float]:
    """Mean, share closed, share open and mean entropy from counts (bins,) and sums (Σg, ΣH, Σg²); {} without tokens."""
    tokens = float(bins.sum())
    if not tokens:
        return {}
    edge = round(CLOSED * BINS)
    return {
        f"{prefix}/mean": float(sums[0]) / tokens,
        f"{prefix}/share_closed": float(bins[:edge].sum()) / tokens,
        f"{prefix}/share_open": float(bins[-edge:].sum()) / tokens,
        f"{prefix}/entropy": float(sums[1]) / tokens,
    }


def _add_histogram(logger: TensorBoardLogger, tag: str, bins: Tensor, sums: Tensor, step: int) -> None:
    """One TensorBoard histogram from counts; skipped without tokens."""
    if not bins.sum():
        return
    limits = [(i + 1) / BINS for i in range(BINS)]
    logger.experiment.add_histogram_raw(
        tag,
        min=0.0,
        max=1.0,
        num=float(bins.sum()),
        sum=float(sums[0]),
        sum_squares=float(sums[2]),
        bucket_limits=limits,
        bucket_counts=bins.tolist(),
        global_step=step,
    )
