"""Heatmaps of the same few texts as training goes on: which tokens, in which layers, are adapted."""

import logging
from typing import Any

import lightning as L
from typing_extensions import override

from gatera_lightning.adapters.lookup import has_token_gates
from gatera_lightning.backbone.loading import context_length
from gatera_lightning.callbacks.tensorboard_loggers import tensorboard_loggers
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_prompt
from gatera_lightning.gate_analysis.plots.canvas import draw_pixels
from gatera_lightning.gate_analysis.plots.heatmap import draw_heatmap
from gatera_lightning.gate_analysis.probing import EXAMPLE_TEXTS, ProbeText, profile_gates
from gatera_lightning.gate_analysis.token_labels import token_labels

log = logging.getLogger(__name__)


class GateHeatmap(L.Callback):
    """TensorBoard images ``gate_heatmap/<number>``, layer × token, of probe texts: at the first step, every so many, the last.

    One forward a text, without dropout, so nothing in training changes by it. A sharded model takes part on every process.
    With a logger other than TensorBoard the pictures are skipped, with one line, and so is a text longer than the model's
    context; without token gates there is nothing to do.
    """

    def __init__(self, every_n_steps: int = 100, texts: list[str] = list(EXAMPLE_TEXTS)) -> None:  # noqa: B006  # never changed
        """Draw the gates.

        Args:
            every_n_steps: Optimizer steps between two pictures; 0 switches them off.
            texts: What to look at.
        """
        if every_n_steps < 0:
            raise ValueError(
                f"gate_heatmap.every_n_steps: {every_n_steps}; accepted: at least 1, or 0 for never"
            )
        if any(not text.strip() for text in texts):
            raise ValueError(f"gate_heatmap.texts: {texts}; accepted: texts, none of them empty")
        self.every_n_steps = every_n_steps
        self.texts = texts
        self._probes: list[ProbeText] = []
        self._labels: list[list[str]] = []
        self._drawn = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        data: Any = getattr(trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        self._probes, self._labels = [], []
        self._drawn = trainer.global_step  # where a run goes on, the run before has drawn this step
        if not self.every_n_steps or tokenizer is None or not has_token_gates(module.model):
            return
        if not tensorboard_loggers(
            trainer, missing="gate heatmaps need the TensorBoard logger: skipping the pictures"
        ):
            return
        limit = context_length(module.model.config)
        for text in self.texts:
            ids = tokenize_prompt(tokenizer, text)
            if limit is not None and len(ids) > limit:
                if trainer.is_global_zero:
                    log.warning(
                        "gate heatmaps: left out %.40r…, %d tokens of at most %d", text, len(ids), limit
                    )
                continue
            self._probes.append(ProbeText(text, ids, len(ids)))
            self._labels.append(token_labels(tokenizer, ids))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == 1 or (self.every_n_steps and step % self.every_n_steps == 0):
            self._draw(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, module: Any) -> None:
        step = trainer.global_step
        if not self._probes or step == self._drawn:
            return
        self._drawn = step
        reading = profile_gates(
            module.model, self._probes
        )  # every process of a sharded model has to take part
        if not trainer.is_global_zero:
            return
        for number, (probe, gates, labels) in enumerate(
            zip(self._probes, reading.gates, self._labels, strict=True), 1
        ):
            picture = draw_pixels(
                draw_heatmap(reading.modules, gates, labels, probe.prompt_length, f"step {step}")
            )
            for logger in tensorboard_loggers(trainer):
                logger.experiment.add_image(f"gate_heatmap/{number}", picture, step, dataformats="HWC")
