"""Gates over time: a histogram per adapted layer, prompt and response tokens apart."""

import logging
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from gatera_lightning.adapters.inject import adapted_linears
from gatera_lightning.datamodules.tokens import Batch
from gatera_lightning.inspection.statistics import BINS, PHASES, GateStatistics, summary

log = logging.getLogger(__name__)


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
        self.counts: GateStatistics | None = None
        self.names: list[str] = []
        self._logged_step = 0
        self._restored: dict[str, Any] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was counted since the last histogram, over all processes; a collective."""
        if self.counts is None:
            return {"logged_step": self._logged_step}
        with self.counts.sync_context():
            bins, sums = self.counts.bins.cpu().clone(), self.counts.sums.cpu().clone()  # these go on changing
        return {"logged_step": self._logged_step, "names": self.names, "bins": bins, "sums": sums}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting: rank 0 with all that was counted, the others from nothing."""
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._logged_step = self._restored.get("logged_step", trainer.global_step)
        if "bins" in self._restored:
            bins, sums = self._restored["bins"].to(pl_module.device), self._restored["sums"].to(pl_module.device)
            self.names, self.counts = self._restored["names"], GateStatistics(bins.shape[1]).to(pl_module.device)
            if trainer.is_global_zero:
                self.counts.bins += bins
                self.counts.sums += sums
        self._restored = {}
        module: Any = pl_module
        gated = any(layer.gate is not None for layer in adapted_linears(module.model).values())
        tensorboard = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        if gated and self.every_n_steps and trainer.loggers and not tensorboard and trainer.is_global_zero:
            log.warning("gate histograms need the TensorBoard logger: keeping the scalars, skipping the pictures")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.every_n_steps or outputs.get("gate_logits") is None:
            return
        z = outputs["gate_logits"]  # (layers, batch, tokens)
        if self.counts is None:
            self.counts = GateStatistics(len(z)).to(z.device)
            self.names = outputs["gate_names"]  # in the order in which the layers ran, as the logits are
        self.counts.update(z, counted_tokens(batch), batch["response_mask"])
        if trainer.global_step > self._logged_step and trainer.global_step % self.every_n_steps == 0:
            self._logged_step = trainer.global_step
            self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        """Sum the counts over ranks, write them, and start anew."""
        assert self.counts is not None
        bins, sums = self.counts.compute()
        self.counts = None
        if not trainer.is_global_zero:
            return
        scalars: dict[str, float] = {}
        for phase, phase_name in enumerate(PHASES):
            scalars |= _statistics(f"gates/{phase_name}", bins[phase], sums[:, phase])
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


def counted_tokens(batch: Batch) -> Tensor:
    """Where a batch (batch, tokens) has real tokens; rows that stand for no example count nowhere."""
    real = batch["attention_mask"] > 0
    if "position_ids" not in batch:  # packed lines hold rows of training, all of which count
        real &= (batch["example_ids"] >= 0).unsqueeze(1)
    return real


def _statistics(prefix: str, bins: Tensor, sums: Tensor) -> dict[str, float]:
    """Mean, share closed, share open and mean entropy from counts (…, bins) and sums (Σg, ΣH, Σg²; …); {} without tokens."""
    found = summary(bins, sums)
    names = ("mean", "share_closed", "share_open", "entropy")
    return {f"{prefix}/{name}": getattr(found, name) for name in names} if found.tokens else {}


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
