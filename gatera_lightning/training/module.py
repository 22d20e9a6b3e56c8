"""GateRAModule: a frozen backbone, its adapter, and the training step."""

from collections.abc import Mapping
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.injection import InjectionReport
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.callbacks.checkpoint_paths import keep_own_paths
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.callbacks.rng_state import RNGState
from gatera_lightning.compatibility.lightning_internals import attached_trainer, read_checkpoints_by
from gatera_lightning.datamodules.batch import Batch, PromptBatch
from gatera_lightning.datamodules.validation_tasks import validation_tasks
from gatera_lightning.distributed.checkpoint_reading import read_alike
from gatera_lightning.distributed.consistency import check_ranks_agree
from gatera_lightning.distributed.packed_weights import exclude_packed_weights
from gatera_lightning.errors import ConfigError, check_arguments
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.generation.drafting import Drafter
from gatera_lightning.objectives.base import Objective, StepOutput, evaluate_objectives
from gatera_lightning.objectives.description import describe_objectives
from gatera_lightning.objectives.next_token import SupervisedLogits, supervised_logits
from gatera_lightning.objectives.training_loss import objectives_for
from gatera_lightning.training import checkpoint_contents, setting_checks, trainer_checks
from gatera_lightning.training.adapter_module import AdapterModule
from gatera_lightning.training.batch_checks import BatchChecks, check_given_loader
from gatera_lightning.training.callback_checks import check_callbacks
from gatera_lightning.training.context_check import check_context
from gatera_lightning.training.effect_checks import effect_problems
from gatera_lightning.training.evaluation_steps import ValidationMetrics, answer_batch
from gatera_lightning.training.hyperparameters import move_deprecated, read_hyperparameters, to_plain
from gatera_lightning.training.model_loading import load_adapted_model
from gatera_lightning.training.non_finite_guard import NonFiniteGuard
from gatera_lightning.training.objective_means import ObjectiveMeans
from gatera_lightning.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    report_new_length,
    squared_gradient_norms,
)
from gatera_lightning.training.resume_rules import check_resume
from gatera_lightning.training.resumed_optimizer import check_moments
from gatera_lightning.training.schedule_checks import check_against_data, check_shares
from gatera_lightning.training.step_totals import StepTotals

AnyBatch = Batch | PromptBatch


class GateRAModule(AdapterModule):
    """Fine-tunes an adapter on a frozen language model with ``L = L_task + λ · L_ent`` (GateRA, AAAI 2026).

    Trains under ``precision="32-true"``: the backbone has the dtype ``backbone.dtype`` and the adapter
    ``adapter.adapter_dtype``.
    """

    def __init__(
        self,
        *,
        backbone: BackboneConfig,
        adapter: AdapterConfig,
        optimizer: OptimizerConfig,
        decoding: DecodingConfig | None = None,
        warm_start: str | None = None,
        objectives: list[Objective] | None = None,
        **deprecated: Any,
    ) -> None:
        """Store the settings; :meth:`configure_model` loads weights, when training or evaluation starts.

        Args:
            backbone: The frozen model.
            adapter: The update, the gate, and the layers to adapt.
            optimizer: AdamW and its schedule.
            decoding: How answers are generated, for data that is evaluated by generation.
            warm_start: An adapter folder whose values the adapter starts from.
            objectives: What to train; null: next-token cross-entropy and the gate entropy.
        """
        super().__init__()
        check_arguments(GateRAModule.__init__, locals())
        adapter, optimizer = move_deprecated(adapter, optimizer, deprecated)
        self.save_hyperparameters(ignore="objectives")
        self.save_hyperparameters(to_plain(self.hparams))
        self.backbone = backbone
        self.adapter = adapter
        self.optimizer = optimizer
        self.decoding = decoding if decoding is not None else DecodingConfig()
        self.warm_start = warm_start
        self.objectives = objectives_for(adapter) if objectives is None else objectives
        self.strict_loading = False  # checkpoints hold the adapter only; load_state_dict checks its tensors
        self.model: PreTrainedModel = None  # type: ignore[assignment]  # until configure_model
        self.report: InjectionReport | None = None
        self.drafter: Drafter | None = None  # set by DraftedAnswers, for test and predict
        self._resumes: Mapping[str, Any] | None = None
        self._described_objectives: dict[str, Any] = {}  # as fit starts: training may change their state
        self.validation_metrics = ValidationMetrics()
        self.objective_means = ObjectiveMeans(self.objectives)
        self._reset_step()

    def problems(self) -> list[str]:
        """Return one message for every setting that cannot work; empty if all are valid. Reads no weights."""
        return setting_checks.module_problems(
            self.backbone, self.adapter, self.optimizer, self.decoding, self.warm_start, self.objectives
        )

    def _reset_step(self) -> None:
        self._totals = StepTotals()
        self._guard = NonFiniteGuard(self.optimizer.max_skipped_steps, self.optimizer.lr)
        self._batch_checks = BatchChecks()

    # --- set-up ---

    def setup(self, stage: str) -> None:
        """Refuse trainer settings that would silently change the result; reset what an earlier run left."""
        trainer_checks.check_trainer(self.trainer, stage, self.decoding, self.backbone, self.adapter)
        setting_checks.check_stage(stage, self.adapter)
        check_context(self.trainer, stage, self.backbone, self.decoding)
        trainer_checks.prepare_trainer(self.trainer)
        read_checkpoints_by(self.trainer, read_alike)
        self._reset_step()
        check_shares(self.trainer, stage)
        if stage == "fit":
            check_given_loader(self.trainer)
            setting_checks.check_unpacked(getattr(self.trainer, "datamodule", None), self.objectives)
            is_ours = type(self) is GateRAModule
            if problems := effect_problems(self.trainer, objectives=self.objectives, is_ours=is_ours):
                raise ConfigError(problems, on_every_rank=True)
            check_against_data(self.trainer, self.optimizer)
            self._described_objectives = describe_objectives(self.objectives)
            step = None if self._resumes is None else f"a checkpoint of step {self._resumes['global_step']}"
            check_ranks_agree(self, self.trainer, self._described_objectives, resumes=step)
            if self._resumes is not None:  # now that the examples are read, and before weights are
                check_resume(
                    self._resumes, self, self.trainer, getattr(self.trainer, "datamodule", None), stage=stage
                )
                self._resumes = None

    def expect_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Compare a checkpoint with the examples that ``fit`` reads, before it loads weights.

        Args:
            checkpoint: What the checkpoint that ``fit`` will resume from holds.
        """
        tensors = ("state_dict", "optimizer_states", "callbacks")
        self._resumes = {name: entry for name, entry in checkpoint.items() if name not in tensors}

    def configure_callbacks(self) -> list[L.Callback]:
        """Add what exact resume (random states) and ``test`` (results) need, with any Trainer.

        Callbacks that change the plan of a step are refused here, before their own set-up runs.
        """
        check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [callback() for callback in (RNGState, EvaluationReport) if callback not in present]

    def configure_model(self) -> None:
        """Load the backbone and its adapter; the second call does nothing."""
        if self.model is None:
            if problems := setting_checks.objective_problems(self.objectives, self.adapter, self.backbone):
                raise ConfigError([f"model.{problem}" for problem in problems], on_every_rank=True)
            strategy = getattr(attached_trainer(self), "strategy", None)
            device = self.device if strategy is None else strategy.root_device
            self.model, self.report = load_adapted_model(
                self.backbone, self.adapter, strategy=strategy, device=device, warm_start=self.warm_start
            )
            exclude_packed_weights(self)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the backbone's tokenizer, for data modules."""
        return load_tokenizer(self.backbone)

    def on_fit_start(self) -> None:
        """Check that the adapter's parameters are trainable and have their dtype."""
        setting_checks.check_adapter_parameters(self.model, self.adapter)

    def on_train_start(self) -> None:
        """Probe before the first step: probing later would make a resumed run differ by rounding."""
        for objective in self.objectives:
            objective.prepare(self.model)
        report_new_length(attached_trainer(self))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Refuse a batch that the loss of its step cannot be computed for."""
        self._batch_checks.check(batch, attached_trainer(self), self.model, self.backbone)

    def configure_optimizers(self) -> Any:
        """AdamW over the adapter's parameters; the schedule counts optimizer steps."""
        optimizer, scheduler = build_optimizer(
            self.optimizer, self.model, total_steps=lambda: self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- the step ---

    def forward(self, batch: Batch) -> SupervisedLogits:
        """Return logits and labels at the positions that predict a supervised token."""
        return supervised_logits(self.model, batch)

    def training_step(self, batch: Batch, batch_idx: int) -> StepOutput:
        """Return this micro-batch's part of the loss of its optimizer step, and its gates for callbacks."""
        for objective in self.objectives:
            objective.begin_step(self.trainer.global_step)
        found = evaluate_objectives(self.objectives, self.model, batch)
        self._totals.add(found)
        self._guard.add(found.loss.detach(), batch["example_ids"])
        # Lightning divides by the accumulation and averages gradients over ranks; the losses are parts of a
        # plain sum.
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return {"loss": parts * found.loss, "gates": found.gates}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the loss and the gradient norms of the whole step, or skip it if one of them is not finite."""
        self._log_under_step(self.trainer.global_step + 1)
        loss, values, squares = self._totals.reduce(
            squared_gradient_norms(optimizer, self.trainer.world_size),
            lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"),
        )
        # Norms above 1.8e19 count as well: their squares overflow in fp32, and so would AdamW's second
        # moments.
        if torch.isfinite(loss + squares.sum()):
            terms = {f"train/{name}": value for name, value in values.items()}
            self.log_dict({"train/loss": loss, **terms}, prog_bar=True)
            for group, norm in zip(optimizer.param_groups, squares.sqrt(), strict=True):  # before clipping
                self.log_dict({f"lr/{group['name']}": group["lr"], f"grad_norm/{group['name']}": norm})
        else:
            norm = float(squares.sum().sqrt())
            self._guard.skip(self.trainer, optimizer, loss=float(loss), gradient_norm=norm)
            self.log("train/skipped_steps", float(self._guard.skipped_steps))
        self._totals.clear()
        self._guard.clear()

    def _log_under_step(self, step: int) -> None:
        """Log under this step, not Lightning's, which is one less; Lightning then omits the epoch."""
        self.log_dict({"step": float(step), "epoch": float(self.current_epoch)})

    # --- evaluation ---

    def on_validation_start(self) -> None:
        """Forget the batches of an earlier validation."""
        self.validation_metrics.reset()
        self.objective_means.reset(validation_tasks(getattr(self.trainer, "datamodule", None)))
        for objective in self.objectives if self.objective_means.are_measured else ():
            objective.prepare(self.model)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure what the objectives do, or the loss of the correct answers and accuracies of ranking."""
        if self.objective_means.are_measured:
            metrics = self.objective_means.update(self.model, batch)
        else:
            metrics = self.validation_metrics.update(batch, self(batch))
        for name, metric in metrics.items():
            self.log(name, metric, prog_bar=name == "val/loss")

    def on_validation_epoch_end(self) -> None:
        """During training, log the validation under the last step that was taken."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._log_under_step(self.trainer.global_step)

    def test_step(self, batch: AnyBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the log-likelihood of each candidate answer, or what is generated after each prompt."""
        is_sharded = self.device_mesh is not None
        return answer_batch(self.model, batch, self.decoding, sharded=is_sharded, drafter=self.drafter)

    def predict_step(self, batch: AnyBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the same as :meth:`test_step`."""
        return self.test_step(batch, batch_idx, dataloader_idx)

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what describes the run, and what the adapter belongs to."""
        checkpoint |= checkpoint_contents.describe_run(
            attached_trainer(self), self._guard.skipped_steps, self._described_objectives
        )
        checkpoint |= checkpoint_contents.describe_adapter(self.model, self.adapter, self.backbone)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits (else CheckpointError), and adjust its position in the data."""
        checkpoint_contents.check_settings(checkpoint, self, attached_trainer(self))
        checkpoint_contents.adjust_position(checkpoint, attached_trainer(self))
        keep_own_paths(checkpoint, getattr(attached_trainer(self), "callbacks", []))
        self._guard.restore(checkpoint.get("skipped_steps", 0))
        self.warm_start = None  # the checkpoint holds every value
        self.configure_model()
        source = checkpoint_contents.checkpoint_source(attached_trainer(self))
        checkpoint_contents.check_checkpoint_fits(checkpoint, self.model, source)
        if checkpoint_contents.resumes_fit(attached_trainer(self)):
            check_moments(checkpoint, self, source)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Create the module from a checkpoint, of version 0.1 too; ``kwargs`` as for Lightning's method."""
        options = kwargs.pop("hparams_file", None), kwargs.get("weights_only")
        settings = read_hyperparameters(checkpoint_path, *options)
        return super().load_from_checkpoint(checkpoint_path, *args, **(settings | kwargs))
