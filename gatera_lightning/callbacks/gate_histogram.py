"""Histograms and statistics of the gates during training."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.callbacks.run_logs import has_run_log, run_logs, scalar_loggers
from gatera_lightning.callbacks.run_logs.base import Histogram
from gatera_lightning.errors import CheckpointError
from gatera_lightning.gate_analysis.history import GateShareHistory
from gatera_lightning.gate_analysis.plots.canvas import draw_pixels
from gatera_lightning.gate_analysis.plots.gate_shares import draw_gate_shares
from gatera_lightning.gate_analysis.skipped_tokens import gates_decide
from gatera_lightning.gate_analysis.statistics import (
    BINS,
    PHASES,
    STATISTICS,
    GateStatistics,
    counted_tokens,
    gated_layers,
    module_groups,
    share_skipped,
    statistics_from_counts,
    sum_over_groups,
)

_BUCKET_LIMITS = [(i + 1) / BINS for i in range(BINS)]


class GateHistogram(L.Callback):
    """Log histograms and statistics of the gates of the training tokens.

    Every ``every_n_steps`` optimizer steps it logs all gates since the last time, separately for prompt and
    response tokens, without padding:

    - histograms ``<group>/prompt`` and ``<group>/response``. The groups are ``gates`` (all modules), one
      ``gate_families/q_proj`` for each projection type, one ``gate_layers/03`` for each decoder layer, and
      one ``gate_modules/<path>`` for each module;
    - scalars of each group except single modules: ``mean``, ``share_closed`` (g < 0.1), ``share_open``
      (g ≥ 0.9) and ``entropy``, and for gates that decide ``share_skipped``, the share of tokens whose update
      evaluation would skip;
    - the image ``gate_shares/layers``: the shares of closed and open gates of every layer since training
      started.

    Counts are summed over ranks. They go to TensorBoard, Weights & Biases and MLflow. If the run has only
    other loggers, only the scalars are logged, and one warning says so. Without gates the callback does
    nothing.

    Example:
        >>> trainer = Trainer(callbacks=[GateHistogram(every_n_steps=100)])
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        """Log histograms and statistics of the gates.

        Args:
            every_n_steps: Optimizer steps between two histograms; 0 turns them off. A small number shows
                changes sooner; each histogram costs a fraction of a second and makes the event files larger.

        Raises:
            ValueError: ``every_n_steps`` is negative.
        """
        if every_n_steps < 0:
            raise ValueError(
                f"gate_histogram.every_n_steps: {every_n_steps}; accepted: at least 1, or 0 for never"
            )
        self.every_n_steps = every_n_steps
        self.counts: GateStatistics | None = None
        self.names: list[str] = []
        self.history: GateShareHistory | None = None
        self._logged_step = 0
        self._decides = False
        self._restored: dict[str, Any] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restored = {}  # the counts of a checkpoint that was only evaluated do not belong to this run

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the counts since the last histogram, summed over ranks, and the history; a collective."""
        state: dict[str, Any] = {"logged_step": self._logged_step}
        if self.history is not None:
            state["history"] = self.history.state_dict()
        if self.counts is not None:
            with self.counts.sync_context():
                bins, sums = self.counts.bins.cpu().clone(), self.counts.sums.cpu().clone()
            state |= {"names": self.names, "bins": bins, "sums": sums}
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts when training starts: all of them on rank 0, none on other ranks."""
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        restored, self._restored = self._restored, {}
        self._logged_step = restored.get("logged_step", trainer.global_step)
        self.history = (
            GateShareHistory.from_state_dict(restored["history"]) if "history" in restored else None
        )
        self.counts, self.names = None, []  # drop the counts of an earlier fit
        module: Any = pl_module
        self._decides = gates_decide(module.model)
        gated = {name for name, layer in adapted_linears(module.model).items() if layer.gate is not None}
        if unknown := set(restored.get("names", ())) - gated:
            raise CheckpointError(
                f"{trainer.ckpt_path}: the checkpoint is corrupt: its entry callbacks.{self.state_key}.names "
                f"has {min(unknown)!r:.60}, which has no gate here"
            )
        if "bins" in restored:
            bins, sums = restored["bins"].to(pl_module.device), restored["sums"].to(pl_module.device)
            self.names = restored["names"]
            self.counts = GateStatistics(bins.shape[1]).to(pl_module.device)
            if trainer.is_global_zero:
                self.counts.bins += bins
                self.counts.sums += sums
        if self.every_n_steps and gated:
            has_run_log(trainer, "gate histograms", missing="only scalars are logged, no pictures")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.every_n_steps:
            return
        gates = outputs["gates"]
        z = gates.stacked(batch["attention_mask"])  # (modules, batch, tokens)
        if z is None:
            return
        if self.counts is None:
            self.counts = GateStatistics(len(z)).to(z.device)
            self.names = gates.names  # in the order of the logits
        if self._decides:  # a logit of 0 closes the gate, and its value of ½ would count as open
            z = z.masked_fill(z == 0, -1e-6)
        self.counts.update(z, counted_tokens(batch), batch["response_mask"])
        if trainer.global_step > self._logged_step and trainer.global_step % self.every_n_steps == 0:
            self._logged_step = trainer.global_step
            self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        """Sum the counts over ranks, log them, and reset them."""
        assert self.counts is not None
        bins, sums = self.counts.compute()
        self.counts = None
        if not trainer.is_global_zero:
            return
        groups = module_groups(self.names)
        bins, sums = sum_over_groups(groups, bins, sums)  # (phases, groups, 50), (3, phases, groups)
        statistics = statistics_from_counts(bins, sums)  # (phases, groups, 4)
        tags = [f"{group}/{phase}" for phase in PHASES for group in groups]
        names, columns = list(STATISTICS), statistics
        if self._decides:
            names, columns = [*names, "share_skipped"], torch.cat([columns, share_skipped(bins)], -1)
        scalars = {
            f"{tag}/{name}": value
            for tag, values in zip(tags, columns.flatten(0, 1).tolist(), strict=True)
            if not tag.startswith("gate_modules/")  # thousands of scalars that nobody would read
            for name, value in zip(names, values, strict=True)
            if not math.isnan(value)  # NaN: no tokens
        }
        for logger in scalar_loggers(trainer):
            logger.log_metrics(scalars, step=trainer.global_step)
        histograms = _histograms(tags, bins.flatten(0, 1), sums.flatten(1))
        logs = run_logs(trainer)
        for run_log in logs:
            run_log.log_statistics(scalars, histograms, trainer.global_step)
        layers = [index for index, group in enumerate(groups) if group.startswith("gate_layers/")]
        if not logs or not layers:
            return
        if self.history is None:
            self.history = GateShareHistory(gated_layers(self.names))
        shares = statistics[:, layers, 1:3].transpose(1, 2)  # (phases, closed and open, layers)
        if self.history.add(trainer.global_step, shares):
            picture = draw_pixels(draw_gate_shares(self.history))
            for run_log in logs:
                run_log.log_picture("gate_shares/layers", picture, trainer.global_step)


def _histograms(tags: list[str], bins: Tensor, sums: Tensor) -> dict[str, Histogram]:
    """Histograms by tag, for the tags that have tokens, from bins (tags, 50) and sums (3, tags)."""
    total, _, squares = sums.tolist()
    return {
        tag: Histogram(_BUCKET_LIMITS, counts, sum_of_gates, sum_of_squares)
        for tag, counts, sum_of_gates, sum_of_squares in zip(tags, bins.tolist(), total, squares, strict=True)
        if any(counts)
    }
