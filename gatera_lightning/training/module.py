"""GateRAModule: a frozen backbone, its adapter, and one step."""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast, get_args

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gate_recording import GateRecord, record_gates
from gatera_lightning.adapters.injection import InjectionReport, adapter_parameters, inject_adapters
from gatera_lightning.adapters.serialization import (
    AdapterFileError,
    backbone_identity,
    check_fit,
    load_adapter,
    read_adapter_config,
)
from gatera_lightning.backbone.compilation import compile_layers
from gatera_lightning.backbone.loading import BackboneConfig, keeps_packed_rows_apart, load_backbone
from gatera_lightning.backbone.recomputation import elementwise_recomputed
from gatera_lightning.callbacks.adapter_checkpoint import TIMED_VALIDATION
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.callbacks.rng_state import RNGState
from gatera_lightning.checkpointing.checkpoint_io import WholeCheckpointIO
from gatera_lightning.checkpointing.resume import begin_next_epoch, recount_batches
from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch, PromptBatch
from gatera_lightning.distributed.consistency import refuse_other_settings
from gatera_lightning.distributed.sharded_loading import load_sharded
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import CheckpointError, ConfigError, NonFiniteLossError
from gatera_lightning.evaluation.candidate_scoring import candidate_log_likelihoods, continues_from_keys
from gatera_lightning.evaluation.likelihood_ranking import Score, answer_log_likelihoods, ranked_questions
from gatera_lightning.generation.decoding import DecodingConfig, generate
from gatera_lightning.objectives.linear_cross_entropy import cross_entropy_in_head, returns_what_its_head_does
from gatera_lightning.objectives.next_token import (
    next_token_labels,
    next_token_mask,
    summed_cross_entropy,
    summed_gate_entropy,
    target_positions_only,
)
from gatera_lightning.training.optimizer import OptimizerConfig, build_optimizer, squared_gradient_norms

log = logging.getLogger(__name__)

# A checkpoint holds these beside tensors; naming them lets it load without unpickling anything else.
torch.serialization.add_safe_globals([AdapterConfig, BackboneConfig, DecodingConfig, OptimizerConfig])


class GateRAModule(L.LightningModule):
    """Fine-tunes an adapter on a frozen causal language model with ``L = L_task + λ · L_ent`` (GateRA, AAAI 2026).

    Trains under ``precision="32-true"``: the backbone's dtype is ``backbone.dtype``, the adapter's masters are fp32,
    and neither is Lightning's to change.
    """

    def __init__(
        self,
        *,
        backbone: BackboneConfig,
        adapter: AdapterConfig,
        optimizer: OptimizerConfig,
        gate_entropy_weight: float = 0.01,
        decoding: DecodingConfig | None = None,
        warm_start: str | None = None,
    ) -> None:
        """Settings only; weights are loaded when training, evaluation or :meth:`configure_model` asks for them.

        Args:
            backbone: The frozen model.
            adapter: The update, the gate, and where they go.
            optimizer: AdamW and its schedule.
            gate_entropy_weight: λ of the entropy term, which pushes gates towards 0 or 1; ignored without gates.
            decoding: How answers are generated, where the data is evaluated by generation.
            warm_start: An adapter folder whose values the adapter starts from.
        """
        super().__init__()
        self.save_hyperparameters()
        self.backbone = backbone
        self.adapter = adapter
        self.optimizer = optimizer
        self.gate_entropy_weight = gate_entropy_weight
        self.decoding = decoding if decoding is not None else DecodingConfig()
        self.warm_start = warm_start
        self.strict_loading = (
            False  # checkpoints hold the adapter only; on_load_checkpoint is strict about that
        )
        self.model: PreTrainedModel = None  # type: ignore[assignment]  # until configure_model
        self.report: InjectionReport | None = None
        self.val_loss = MeanMetric(nan_strategy=float("inf"))  # a NaN must not be dropped from the mean
        self.val_accuracy = torch.nn.ModuleDict(
            {score: MeanMetric(nan_strategy="error") for score in get_args(Score)}
        )
        self._loss_is_in_head = False  # until on_train_start
        self._packing_is_tried = False
        self._skipped_steps = 0
        self._step_sums = torch.zeros(3)
        self._step_history: list[tuple[Tensor, Tensor]] = []

    def problems(self) -> list[str]:
        """Everything about the settings that cannot work; empty when all is well. Reads no weights."""
        found = (
            self.backbone.problems()
            + self.adapter.problems()
            + self.optimizer.problems()
            + self.decoding.problems()
        )
        if self.backbone.compile and self.adapter.tells_tokens_apart:
            found.append(
                f"backbone.compile: true, with adapter.skip_below {self.adapter.skip_below} and merge_above "
                f"{self.adapter.merge_above}, whose products have as many rows as gates decide; accepted: false, or 0 and 1"
            )
        if not 0 <= self.gate_entropy_weight < math.inf:
            found.append(f"gate_entropy_weight: {self.gate_entropy_weight}; accepted: a number of at least 0")
        if self.warm_start is not None:
            try:
                there, _ = read_adapter_config(self.warm_start)
            except AdapterFileError as error:
                found.append(f"warm_start: {error}; accepted: an adapter folder, or null")
            else:
                for name in ("update", "gate", "rank", "scale"):
                    if getattr(there, name) != getattr(self.adapter, name):
                        found.append(
                            f"warm_start: {self.warm_start} has {name} {getattr(there, name)}, but model.adapter.{name} is "
                            f"{getattr(self.adapter, name)}"
                        )
        return [f"model.{problem}" for problem in found]

    # --- set-up ---

    def setup(self, stage: str) -> None:
        """Refuse what would silently compute something else; begin without what an earlier run left behind.

        Lightning's sampler would share out rows that the data module has shared out already. Checkpoints are written whole
        or not at all, whoever builds the Trainer.
        """
        if self.trainer.precision != "32-true":
            raise ConfigError(
                f"trainer.precision: {self.trainer.precision} would cast the adapter's masters; accepted: 32-true. "
                "Set model.backbone.dtype instead"
            )
        if stage == "fit" and self.trainer._val_check_time_interval is not None:  # type: ignore[attr-defined]
            raise ConfigError(TIMED_VALIDATION)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        if self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError(
                "trainer.use_distributed_sampler: true would cut up planned batches; accepted: false"
            )
        if isinstance(self.trainer.strategy, AdapterShardingStrategy):
            if self.decoding.tells_tokens_apart:
                raise ConfigError(
                    f"model.decoding.skip_below: {self.decoding.skip_below}, merge_above: {self.decoding.merge_above}, with "
                    "sharded weights, which are not merged; accepted: 0 and 1, or trainer.strategy auto or ddp"
                )
            # FSDP2 keeps the tensors it gathers into: made in inference mode, they could not be trained through later, and a
            # single shard could not be gathered at all.
            for loop in (self.trainer.validate_loop, self.trainer.test_loop, self.trainer.predict_loop):
                loop.inference_mode = False
        self._skipped_steps = 0
        self._step_sums = torch.zeros(3)
        self._step_history = []
        if stage == "fit":
            refuse_other_settings(self, self.trainer)

    def configure_callbacks(self) -> list[L.Callback]:
        """Exact resume needs the random state of every rank, and ``test`` its results, whoever builds the Trainer."""
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [callback() for callback in (RNGState, EvaluationReport) if callback not in present]

    def configure_model(self) -> None:
        """Load the backbone, inject the adapter, shard if the strategy has a mesh; does nothing the second time."""
        if self.model is not None:
            return
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, AdapterShardingStrategy):
            model, self.report = load_sharded(
                self.backbone, self.adapter, strategy, seed=seed, warm_start=self.warm_start
            )
        elif self.device_mesh is not None:
            raise ConfigError(
                f"trainer.strategy: {type(strategy).__name__}; accepted for sharding: AdapterShardingStrategy"
            )
        else:
            model = load_backbone(
                self.backbone, self.device.type if strategy is None else strategy.root_device.type
            )
            self.report = inject_adapters(model, self.adapter, torch.Generator().manual_seed(seed))
            if self.warm_start is not None:
                load_adapter(model, self.warm_start)
        if self.backbone.compile:
            compile_layers(model)
        model.train()  # Hugging Face returns eval mode, which silences dropout and gradient checkpointing
        self.model = model

    def on_fit_start(self) -> None:
        """Refuse what would silently train something else."""
        wanted = getattr(torch, self.adapter.adapter_dtype)
        for name, parameter in adapter_parameters(self.model).items():
            if parameter.dtype != wanted or not parameter.requires_grad:
                raise RuntimeError(f"{name} should be trainable in {wanted}, but is {parameter.dtype}")

    def on_train_start(self) -> None:
        """Find out whether the head can compute the loss: before the first batch, so that a resumed run rounds as it did."""
        self._loss_is_in_head = returns_what_its_head_does(self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Refuse the first packed batch if the model cannot tell its rows apart."""
        if "position_ids" in batch and not self._packing_is_tried:
            if not keeps_packed_rows_apart(self.model):
                raise ConfigError(
                    f"data.packing: true, and packed rows see each other in {type(self.model).__name__} with "
                    f"backbone.attn_implementation {self.backbone.attn_implementation}; accepted: false"
                )
            self._packing_is_tried = True

    def configure_optimizers(self) -> Any:
        """AdamW over the adapter's parameters; the schedule counts optimizer steps."""
        optimizer, scheduler = build_optimizer(
            self.optimizer, self.model, total_steps=lambda: self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- the step ---

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, GateRecord]:
        """Logits (1, targets, vocabulary), labels (targets,), and the gates that were met."""
        labels = next_token_labels(batch["labels"])
        keep = labels != IGNORE_INDEX  # (batch, tokens)
        with (
            elementwise_recomputed(),
            target_positions_only(self.model, keep),
            record_gates(self.model) as gates,
        ):
            if "position_ids" in batch:  # packed: without a mask, positions that begin anew keep rows apart
                seen = {"attention_mask": None, "position_ids": batch["position_ids"]}
            else:
                seen = {"attention_mask": batch["attention_mask"]}
            logits = self.model(input_ids=batch["input_ids"], **seen).logits
        return logits, labels[keep], gates

    def summed_task_loss(self, batch: Batch) -> tuple[Tensor, GateRecord]:
        """``ΣCE`` of a micro-batch, and the gates that were met; without logits where the head can compute it."""
        if not self._loss_is_in_head:
            logits, targets, gates = self(batch)
            return summed_cross_entropy(logits, targets), gates
        labels = next_token_labels(batch["labels"])
        with cross_entropy_in_head(self.model, labels[labels != IGNORE_INDEX]):
            loss, _, gates = self(batch)
        return loss.squeeze(), gates

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """This micro-batch's part of the loss of its whole optimizer step."""
        task, gates = self.summed_task_loss(batch)
        task = task / max(1, batch["step_supervised_tokens"])
        z = gates.stacked(batch["attention_mask"])  # (layers, batch, tokens)
        entropy = gate_mean = task.new_zeros(())
        if z is not None:
            real = batch["attention_mask"]
            per_gate = max(1, batch["step_tokens"]) * len(z)
            entropy = summed_gate_entropy(z if self.gate_entropy_weight else z.detach(), real) / per_gate
            gate_mean = (torch.sigmoid(z.detach()) * real).sum() / per_gate
        loss = task + self.gate_entropy_weight * entropy

        self._step_sums = self._step_sums.to(loss.device) + torch.stack(
            [task.detach(), entropy.detach(), gate_mean]
        )
        self._step_history.append((loss.detach(), batch["example_ids"]))
        # Lightning divides by the accumulation and averages gradients over ranks; whole-step totals want a plain sum.
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return {
            "loss": parts * loss,
            "gate_logits": None if z is None else z.detach(),
            "gate_names": gates.names,
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the whole step's loss and gradient norms; leave out a step that is not finite, and stop before one too many.

        Raises NonFiniteLossError on every rank alike, with the step and the example ids.
        """
        self._log_at(self.trainer.global_step + 1)
        squares = squared_gradient_norms(optimizer, self.trainer.world_size).to(self._step_sums)
        sums = self.trainer.strategy.reduce(torch.cat([self._step_sums, squares]), reduce_op="sum")
        (task, entropy, gate_mean), squares = sums[:3].unbind(), sums[3:]
        loss = task + self.gate_entropy_weight * entropy
        # Norms above 1.8e19 count as well: their squares overflow in fp32, and so would AdamW's second moments.
        if not torch.isfinite(loss + squares.sum()):
            self._skip(optimizer, self._describe_non_finite(float(loss), float(squares.sum().sqrt())))
            return
        self.log_dict({"train/loss": loss, "train/task_loss": task}, prog_bar=True)
        if self.adapter.gate != "none":
            self.log_dict({"train/gate_entropy": entropy, "train/gate_mean": gate_mean}, prog_bar=True)
        for group, norm in zip(optimizer.param_groups, squares.sqrt(), strict=True):  # before clipping
            self.log_dict({f"lr/{group['name']}": group["lr"], f"grad_norm/{group['name']}": norm})
        self._step_sums = torch.zeros_like(self._step_sums)
        self._step_history.clear()

    def _log_at(self, step: int) -> None:
        """Let Lightning log under the step that has been taken, as callbacks do: by itself it is one behind.

        It takes a metric of that name for the step, and then no longer adds the epoch.
        """
        self.log_dict({"step": float(step), "epoch": float(self.current_epoch)})

    def _skip(self, optimizer: torch.optim.Optimizer, reason: str) -> None:
        """Let the optimizer step do nothing: without gradients, neither parameters nor moments move."""
        limit = self.optimizer.max_skipped_steps
        if self._skipped_steps >= limit:
            last = getattr(self.trainer.checkpoint_callback, "last_model_path", "") or "none was written"
            raise NonFiniteLossError(
                f"{reason} Steps left out before: {self._skipped_steps} of {limit}. Last checkpoint: {last}"
            )
        self._skipped_steps += 1
        if self.trainer.is_global_zero:
            log.warning("left out %d of at most %d steps: %s", self._skipped_steps, limit, reason)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self.log("train/skipped_steps", float(self._skipped_steps))
        self._step_sums = torch.zeros_like(self._step_sums)
        self._step_history.clear()

    def _describe_non_finite(self, loss: float, norm: float) -> str:
        """Step and example ids of the micro-batches to blame (all of the step's, if it is a gradient), from every rank."""
        by_loss = not math.isfinite(loss)
        blamed = [
            int(i)
            for value, ids in self._step_history
            if not (by_loss and torch.isfinite(value))
            for i in ids
        ]
        everyone: list[Any] = [blamed]
        if torch.distributed.is_initialized():
            everyone = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everyone, blamed)
        ids = sorted(i for part in everyone for i in part)
        return (
            f"the loss of optimizer step {self.trainer.global_step} is {loss} and the norm of its gradients {norm}; "
            "example ids of the micro-batches concerned: "
            f"{ids}. The step was not taken and earlier checkpoints are untouched. Usual causes: optimizer.lr too large "
            f"({self.optimizer.lr}), or gradient clipping off (trainer.gradient_clip_val)."
        )

    # --- evaluation ---

    def on_validation_start(self) -> None:
        """Make the metrics' sums anew: those of an earlier ``validate`` are inference tensors, which ``fit`` cannot add to."""
        for metric in (self.val_loss, *self.val_accuracy.values()):
            cast(MeanMetric, metric).reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect ``Σ CE / target tokens`` of the right answers over the whole split, whatever the batch sizes.

        With every candidate in the batch, accuracies as well.
        """
        logits, targets, _ = self(batch)
        kept = next_token_labels(batch["labels"]) != IGNORE_INDEX  # (batch, tokens)
        right = batch["answer_ids"] == batch["gold_ids"]  # (batch,)
        of_right = right[kept.nonzero()[:, 0]]  # (n,)
        count = int(of_right.sum())
        if count:
            loss = summed_cross_entropy(logits[:, of_right], targets[of_right])
            self.val_loss.update(loss / count, weight=count)
        self.log("val/loss", self.val_loss, prog_bar=True)
        if batch["all_candidates_present"]:
            scores = answer_log_likelihoods(logits, targets, kept, next_token_mask(batch["response_mask"]))
            questions = ranked_questions(batch, *scores)
            for score, accuracy in self.val_accuracy.items():
                for question in questions:
                    accuracy.update(float(question.choice(score) == question.gold))  # type: ignore[arg-type, operator]
                self.log(f"val/accuracy_{score}", accuracy)  # type: ignore[arg-type]

    def on_validation_epoch_end(self) -> None:
        """Within training, its step is the last one taken."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._log_at(self.trainer.global_step)

    def test_step(
        self, batch: Batch | PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """The log-likelihood of each candidate answer, or what the model generates after each prompt."""
        if "labels" not in batch:
            return {
                "generated": generate(self.model, batch, self.decoding, in_step=self.device_mesh is not None)
            }
        batch = cast(Batch, batch)
        if batch["all_candidates_present"] and self.decoding.use_cache and continues_from_keys(self.model):
            log_likelihoods, tokens = candidate_log_likelihoods(self.model, batch)
            return {"log_likelihoods": log_likelihoods, "tokens": tokens}
        logits, targets, _ = self(batch)
        kept = next_token_labels(batch["labels"]) != IGNORE_INDEX
        log_likelihoods, tokens = answer_log_likelihoods(logits, targets, kept, counted=kept)
        return {"log_likelihoods": log_likelihoods, "tokens": tokens}

    def predict_step(
        self, batch: Batch | PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """As in ``test``."""
        return self.test_step(batch, batch_idx, dataloader_idx)

    # --- checkpoints ---

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter's tensors only: a checkpoint never holds the backbone."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        own = (
            {f"{prefix}model.{name}" for name in adapter_parameters(self.model)}
            if self.model is not None
            else set()
        )
        for name in list(state):
            if name not in own:
                del state[name]
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the adapter's tensors; the frozen backbone's absence is no news and is not reported."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        own = {f"model.{name}" for name in adapter_parameters(self.model)}
        missing, unexpected = [name for name in result.missing_keys if name in own], result.unexpected_keys
        if strict and (missing or unexpected):
            raise RuntimeError(f"adapter tensors missing: {missing}; without a place: {unexpected}")
        return type(result)(missing, unexpected)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how many steps were left out, what this is an adapter of, and how its prompts were written."""
        data = None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["template"] = getattr(data, "template", None)
        checkpoint["skipped_steps"] = self._skipped_steps
        checkpoint["adapter"] = asdict(self.adapter)
        checkpoint["backbone"] = {
            "id": self.backbone.id,
            "revision": self.backbone.revision or getattr(self.model.config, "_commit_hash", None),
            "fingerprint": backbone_identity(self.model),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise CheckpointError unless it is of this adapter on this backbone; count its batches as this run cuts its steps."""
        if missing := [name for name in ("state_dict", "adapter", "backbone") if name not in checkpoint]:
            raise CheckpointError(f"the checkpoint is none of an adapter; it lacks {', '.join(missing)}")
        self._skipped_steps = checkpoint.get("skipped_steps", 0)
        if self._trainer is not None:  # None where a module is loaded by itself
            recount_batches(checkpoint, self.trainer.accumulate_grad_batches)
            if self.trainer.max_steps != -1 and "loops" in checkpoint:
                begin_next_epoch(checkpoint)
        self.warm_start = None  # the checkpoint holds every value
        self.configure_model()
        tensors = {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}
        try:
            check_fit(
                self.model,
                AdapterConfig(**checkpoint["adapter"]),
                checkpoint["backbone"],
                tensors,
                "the checkpoint",
            )
        except AdapterFileError as error:
            raise CheckpointError(str(error)) from error
