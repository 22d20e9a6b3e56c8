"""Gates over time: histograms of all, of each family, layer and module, prompt and response tokens apart."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from torch import Tensor
from typing_extensions import override

from gatera_lightning.adapters.injection import adapted_linears
from gatera_lightning.callbacks.tensorboard_loggers import tensorboard_loggers
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.plots.gate_shares import ShareHistory, draw_shares
from gatera_lightning.gate_analysis.plots.heatmap import pixels
from gatera_lightning.gate_analysis.statistics import (
    BINS,
    PHASES,
    STATISTICS,
    GateStatistics,
    statistics_of_counts,
)

_LIMITS = [(i + 1) / BINS for i in range(BINS)]


class GateHistogram(L.Callback):
    """Every ``every_n_steps`` optimizer steps, what the gates did since the last time.

    TensorBoard histograms ``<group>/prompt`` and ``<group>/response``, where a group is ``gates`` (all of them),
    ``gate_families/q_proj``, ``gate_layers/03`` or ``gate_modules/<path>``, and scalars under each but the last: ``mean``,
    ``share_closed`` (g < 0.1), ``share_open`` (g ≥ 0.9) and ``entropy``. The image ``gate_shares/layers`` shows the shares of
    every layer from the start of the run on. Counts are summed over ranks. With a logger other than TensorBoard the scalars
    are kept and the pictures skipped, with one line; without gates there is nothing to do.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        """Watch the gates.

        Args:
            every_n_steps: Optimizer steps between two histograms; 0 switches them off.
        """
        if every_n_steps < 0:
            raise ValueError(
                f"gate_histogram.every_n_steps: {every_n_steps}; accepted: at least 1, or 0 for never"
            )
        self.every_n_steps = every_n_steps
        self.counts: GateStatistics | None = None
        self.names: list[str] = []
        self.history: ShareHistory | None = None
        self._logged_step = 0
        self._restored: dict[str, Any] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restored = {}  # what a checkpoint that was evaluated had counted is not this run's

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was counted since the last histogram, over all processes, and the picture so far; a collective."""
        state: dict[str, Any] = {"logged_step": self._logged_step}
        if self.history is not None:
            state["history"] = self.history.state()
        if self.counts is not None:
            with self.counts.sync_context():
                bins, sums = (
                    self.counts.bins.cpu().clone(),
                    self.counts.sums.cpu().clone(),
                )  # these go on changing
            state |= {"names": self.names, "bins": bins, "sums": sums}
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting: rank 0 with all that was counted, the others from nothing."""
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._logged_step = self._restored.get("logged_step", trainer.global_step)
        self.history = ShareHistory(**self._restored["history"]) if "history" in self._restored else None
        self.counts, self.names = None, []  # those of another fit
        if "bins" in self._restored:
            bins, sums = (
                self._restored["bins"].to(pl_module.device),
                self._restored["sums"].to(pl_module.device),
            )
            self.names, self.counts = (
                self._restored["names"],
                GateStatistics(bins.shape[1]).to(pl_module.device),
            )
            if trainer.is_global_zero:
                self.counts.bins += bins
                self.counts.sums += sums
        self._restored = {}
        module: Any = pl_module
        if self.every_n_steps and any(
            layer.gate is not None for layer in adapted_linears(module.model).values()
        ):
            missing = (
                "gate histograms need the TensorBoard logger: keeping the scalars, skipping the pictures"
            )
            tensorboard_loggers(trainer, missing=missing)

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
        groups = gate_groups(self.names)
        member = torch.zeros(len(groups), len(self.names), dtype=torch.double)
        for row, modules in zip(member, groups.values(), strict=True):
            row[modules] = 1
        bins, sums = (
            member @ bins.double(),
            sums @ member.T,
        )  # (phases, groups, 50), (3, phases, groups); exact to 2^53
        statistics = statistics_of_counts(bins, sums)  # (phases, groups, 4)
        tags = [f"{group}/{phase}" for phase in PHASES for group in groups]
        scalars = {
            f"{tag}/{name}": value
            for tag, values in zip(tags, statistics.flatten(0, 1).tolist(), strict=True)
            for name, value in zip(STATISTICS, values, strict=True)
            if not (
                math.isnan(value) or tag.startswith("gate_modules/")
            )  # no tokens; a thousand lines that nobody reads
        }
        writers = [logger.experiment for logger in tensorboard_loggers(trainer)]
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_metrics(scalars, step=trainer.global_step)
        for writer in writers:  # one event: thousands of them take ten times as long
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            values += _histograms(tags, bins.flatten(0, 1), sums.flatten(1))
            writer._get_file_writer().add_summary(Summary(value=values), trainer.global_step)
        layers = [place for place, group in enumerate(groups) if group.startswith("gate_layers/")]
        if not writers or not layers:
            return
        if self.history is None:
            self.history = ShareHistory(_layers(self.names))
        shares = statistics[:, layers, 1:3].transpose(1, 2)  # (phases, closed and open, layers)
        if self.history.add(trainer.global_step, shares):
            picture = pixels(draw_shares(self.history))
            for writer in writers:
                writer.add_image("gate_shares/layers", picture, trainer.global_step, dataformats="HWC")


def gate_groups(names: list[str]) -> dict[str, list[int]]:
    """Groups of modules by their tags: all, each family (``q_proj``), each decoder layer, and each module by itself."""
    modules = [GatedModule(name) for name in names]
    layers = _layers(names)
    width = max(2, len(str(max(layers, default=0))))  # so that names sort as numbers do
    groups = {"gates": list(range(len(modules)))}
    for family in dict.fromkeys(module.name for module in modules):
        groups[f"gate_families/{family}"] = [i for i, module in enumerate(modules) if module.name == family]
    for layer in layers:
        groups[f"gate_layers/{layer:0{width}}"] = [
            i for i, module in enumerate(modules) if module.layer == layer
        ]
    return groups | {f"gate_modules/{name}": [i] for i, name in enumerate(names)}


def _layers(names: list[str]) -> list[int]:
    """The decoder layers that have gates."""
    return sorted({GatedModule(name).layer for name in names} - {-1})


def counted_tokens(batch: Batch) -> Tensor:
    """Where a batch (batch, tokens) has real tokens; rows that stand for no example count nowhere."""
    real = batch["attention_mask"] > 0
    if "position_ids" not in batch:  # packed lines hold rows of training, all of which count
        real &= (batch["example_ids"] >= 0).unsqueeze(1)
    return real


def _histograms(tags: list[str], bins: Tensor, sums: Tensor) -> list[Summary.Value]:
    """A TensorBoard histogram each from counts (groups, 50) and sums (3, groups); none without tokens."""
    total, _, squares = sums.tolist()
    return [
        Summary.Value(
            tag=tag,
            histo=HistogramProto(
                min=0,
                max=1,
                num=sum(counts),
                sum=of_g,
                sum_squares=of_squares,
                bucket_limit=_LIMITS,
                bucket=counts,
            ),
        )
        for tag, counts, of_g, of_squares in zip(tags, bins.tolist(), total, squares, strict=True)
        if any(counts)
    ]
