"""The callbacks of every run, each with a section of its own in the config."""

from lightning.pytorch import Callback

from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.callbacks.drafted_answers import DraftedAnswers
from gatera_lightning.callbacks.early_stopping import OptionalEarlyStopping
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.callbacks.gate_heatmap import GateHeatmap
from gatera_lightning.callbacks.gate_histogram import GateHistogram
from gatera_lightning.callbacks.generated_samples import GeneratedSamples
from gatera_lightning.callbacks.run_summary import RunSummary
from gatera_lightning.callbacks.safe_preempt import SafePreempt
from gatera_lightning.callbacks.step_watchdog import StepWatchdog
from gatera_lightning.callbacks.tensorboard_overview import TensorBoardOverview
from gatera_lightning.callbacks.throughput import Throughput

RUN_CALLBACKS: dict[str, type[Callback]] = {
    "checkpoint": AdapterCheckpoint,
    "early_stopping": OptionalEarlyStopping,
    "evaluation": EvaluationReport,
    "gate_heatmap": GateHeatmap,
    "gate_histogram": GateHistogram,
    "generated_samples": GeneratedSamples,
    "preempt": SafePreempt,
    "throughput": Throughput,
    "watchdog": StepWatchdog,
}
"""Section of the config -> the callback that it configures."""


def drafted_answers(draft: str | None, block: int | None) -> DraftedAnswers | None:
    """Return the callback that the settings `draft` and `draft_block` describe; None without drafts."""
    if draft is None:
        return None
    return DraftedAnswers(draft) if block is None else DraftedAnswers(draft, block)


def default_trainer_callbacks() -> list[Callback]:
    """Return the defaults of `trainer.callbacks`: callbacks without settings, which a config may replace."""
    return [RunSummary(), TensorBoardOverview()]
