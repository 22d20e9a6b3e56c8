"""Heatmaps of the same few texts as training goes on: which tokens, in which layers, are adapted."""

import logging
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from gatera_lightning.adapters.inject import adapted_linears
from gatera_lightning.inspection.heatmap import draw_heatmap, pixels
from gatera_lightning.inspection.reading import EXAMPLE_TEXTS, ProbeText, read_gates
from gatera_lightning.inspection.token_text import token_texts

log = logging.getLogger(__name__)


class GateHeatmap(L.Callback):
    """TensorBoard images ``gate_heatmap/<number>``, layer × token, of probe texts: at the first step and every so many.

    One forward a text, without dropout, so nothing in training changes by it. A sharded model takes part on every process.
    With a logger other than TensorBoard the pictures are skipped, with one line; without token gates there is nothing to do.
    """

    def __init__(self, every_n_steps: int = 100, texts: list[str] = list(EXAMPLE_TEXTS)) -> None:  # noqa: B006  # never changed
        """Draw the gates.

        Args:
            every_n_steps: Optimizer steps between two pictures; 0 switches them off.
            texts: What to look at.
        """
        if every_n_steps < 0:
            raise ValueError(f"gate_heatmap.every_n_steps: {every_n_steps}; accepted: at least 1, or 0 for never")
        if any(not text.strip() for text in texts):
            raise ValueError(f"gate_heatmap.texts: {texts}; accepted: texts, none of them empty")
        self.every_n_steps = every_n_steps
        self.texts = texts
        self._probes: list[ProbeText] = []
        self._labels: list[list[str]] = []
        self._drawn: int | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        data: Any = getattr(trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        self._probes, self._drawn = [], None
        gated = any(layer.gate is not None and layer.gate.depends_on_token for layer in adapted_linears(module.model).values())
        if not gated or not self.every_n_steps or tokenizer is None:
            return
        if not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            if trainer.loggers and trainer.is_global_zero:
                log.warning("gate heatmaps need the TensorBoard logger: skipping the pictures")
            return
        for text in self.texts:
            ids = tokenizer(text).input_ids
            self._probes.append(ProbeText(text, ids, len(ids)))
            self._labels.append(token_texts(tokenizer, ids))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step == 1 or (self.every_n_steps and step % self.every_n_steps == 0)
        if not self._probes or not due or step == self._drawn:
            return
        self._drawn = step
        module: Any = pl_module
        reading = read_gates(module.model, self._probes)  # every process of a sharded model has to take part
        if not trainer.is_global_zero:
            return
        for number, (probe, gates, labels) in enumerate(zip(self._probes, reading.gates, self._labels, strict=True), 1):
            picture = pixels(draw_heatmap(reading.modules, gates, labels, probe.prompt, f"step {step}"))
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"gate_heatmap/{number}", picture, step, dataformats="HWC")
