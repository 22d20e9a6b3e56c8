"""Heatmaps of the gates on a few fixed texts during training."""

import logging
from typing import Any

import lightning as L
from typing_extensions import override

from gatera_lightning.adapters.lookup import has_token_gates
from gatera_lightning.backbone.loading import context_length
from gatera_lightning.callbacks.run_logs import has_run_log, run_logs
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_prompt
from gatera_lightning.gate_analysis.plots.canvas import draw_pixels
from gatera_lightning.gate_analysis.plots.heatmap import draw_heatmap
from gatera_lightning.gate_analysis.probing import EXAMPLE_TEXTS, ProbeText, profile_gates
from gatera_lightning.gate_analysis.token_labels import token_labels

log = logging.getLogger(__name__)


class GateHeatmap(L.Callback):
    """Log layer × token heatmaps of the gates on fixed texts, as ``gate_heatmap/<number>``.

    Heatmaps are drawn at the first step, every ``every_n_steps`` steps, and at the last step. Each text takes
    one forward pass without dropout, so training does not change. With a sharded model, every rank takes
    part.

    They go to TensorBoard, Weights & Biases and MLflow. If the run has only other loggers, there are no
    heatmaps, and one warning says so. A text longer than the model's context is skipped with a warning.
    Without token gates the callback does nothing.

    Example:
        >>> trainer = Trainer(callbacks=[GateHeatmap(texts=["Question: What do bees make?\\nAnswer: honey"])])
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        texts: list[str] = list(EXAMPLE_TEXTS),  # noqa: B006  # never mutated
    ) -> None:
        """Draw heatmaps of the gates.

        Args:
            every_n_steps: Optimizer steps between two heatmaps; 0 turns them off. Each heatmap costs one
                forward pass and one drawing for every text.
            texts: The texts whose gates are drawn.

        Raises:
            ValueError: ``every_n_steps`` is negative, or a text is empty.
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
        self._drawn_step = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        data: Any = getattr(trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        self._probes, self._labels = [], []
        self._drawn_step = trainer.global_step  # a run that is resumed here has already drawn this step
        if not self.every_n_steps or tokenizer is None or not has_token_gates(module.model):
            return
        if not has_run_log(trainer, "gate heatmaps", missing="no heatmaps are drawn"):
            return
        limit = context_length(module.model.config)
        for text in self.texts:
            ids = tokenize_prompt(tokenizer, text)
            if limit is not None and len(ids) > limit:
                if trainer.is_global_zero:
                    log.warning(
                        "gate heatmaps: skipped the text %.40r…: %d tokens, but the model accepts at most %d",
                        text,
                        len(ids),
                        limit,
                    )
                continue
            self._probes.append(ProbeText(text, ids, prompt_length=len(ids)))
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
        if not self._probes or step == self._drawn_step:
            return
        self._drawn_step = step
        profile = profile_gates(module.model, self._probes)  # on every rank, for a sharded model
        if not trainer.is_global_zero:
            return
        for number, (probe, gates, labels) in enumerate(
            zip(self._probes, profile.gates, self._labels, strict=True), 1
        ):
            figure = draw_heatmap(profile.modules, gates, labels, probe.prompt_length, f"step {step}")
            picture = draw_pixels(figure)
            for run_log in run_logs(trainer):
                run_log.log_picture(f"gate_heatmap/{number}", picture, step)
