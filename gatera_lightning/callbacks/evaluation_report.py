"""The results of an evaluation: predictions on disk as they are computed, then a table and a summary file."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from datasets import Dataset
from rich.text import Text
from torch import Tensor
from typing_extensions import override

from gatera_lightning.backbone.source import expand_path
from gatera_lightning.callbacks.drafted_answers import report_drafts
from gatera_lightning.callbacks.evaluation_record import evaluation_identity, evaluation_record
from gatera_lightning.callbacks.text_scoring import score_texts
from gatera_lightning.checkpointing.atomic_files import write_text
from gatera_lightning.checkpointing.output_check import folder_problem
from gatera_lightning.distributed.gather import gather_objects
from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.identity import IDENTITY_FILE, check_identity
from gatera_lightning.evaluation.json_objects import read_object
from gatera_lightning.evaluation.likelihood_ranking import ranked_questions
from gatera_lightning.evaluation.prediction_files import (
    PREDICTIONS_FILE,
    PartFile,
    delete_predictions,
    read_records,
    write_predictions,
)
from gatera_lightning.evaluation.predictions import (
    GeneratedAnswer,
    Records,
    TextWithReference,
    generation_record,
    likelihood_record,
)
from gatera_lightning.evaluation.recorded_example import check_record
from gatera_lightning.evaluation.results import SUMMARY_FILE, EvaluationResult
from gatera_lightning.evaluation.results_table import print_results
from gatera_lightning.evaluation.text_metrics import bert_layer_problem
from gatera_lightning.gate_analysis.skipped_tokens import (
    SkippedTokens,
    counting_skipped_tokens,
    describe_shares,
    gates_decide,
)
from gatera_lightning.terminal.printing import SafeConsole

log = logging.getLogger(__name__)


class EvaluationReport(L.Callback):
    """Write ``predictions.jsonl`` with one line per example; after ``test``, also print and save the results.

    The table of results is printed, and its numbers go to ``test_results.json``. If the gates decide, both
    say which share of the tokens each layer skipped, of prompts and given answers. Every batch of
    predictions is written to disk as soon as it is computed. With a ``folder``, an evaluation that was killed
    continues where it stopped, on any number of ranks, and ends with the same files. ``result`` holds the
    last result.

    Example:
        >>> report = EvaluationReport("results/arc")
        >>> Trainer(callbacks=[report]).test(module, datamodule=data)
        >>> report.result.average("per_token")
    """

    def __init__(
        self, folder: str | None = None, bert_model: str = "roberta-large", bert_layer: int = 17
    ) -> None:
        """Write predictions and results.

        Args:
            folder: Folder of the evaluation. Predictions that are already there are not computed again,
                unless they belong to another model or other data, which is an error. null uses the run's log
                folder and computes everything again.
            bert_model: The model of BERTScore: a hub id that is already downloaded, or a folder. If it is
                missing, the metric is skipped with a remark in the results.
            bert_layer: The layer of bert_model whose outputs are compared. 17 is the choice of BERTScore's
                authors for roberta-large; another model needs another layer.

        Raises:
            ValueError: ``bert_layer`` is less than 1.
        """
        if not isinstance(folder, str | os.PathLike | None):
            raise TypeError(f"evaluation.folder: {folder!r:.60}; accepted: null, or a folder")
        if not isinstance(bert_layer, int) or isinstance(bert_layer, bool) or bert_layer < 1:
            raise ValueError(f"evaluation.bert_layer: {bert_layer!r:.60}; accepted: an integer of at least 1")
        self.folder = folder
        self.bert_model = bert_model
        self.bert_layer = bert_layer
        self.result: EvaluationResult | None = None
        self._stored_identity: dict[str, Any] | None = None
        self._stored_summary: dict[str, Any] = {}
        self._skipped = SkippedTokens()
        self._counting = ExitStack()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read earlier predictions, and make the data module skip their examples in the loaders it builds."""
        if stage not in ("test", "predict"):
            return
        log_folder = trainer.log_dir or trainer.default_root_dir  # log_dir is a collective: all ranks read it
        self._path = Path(log_folder if self.folder is None else expand_path(self.folder))
        problem = self._prepare_folder() if trainer.is_global_zero else ""
        if problem := trainer.strategy.broadcast(problem):  # only rank 0 reads and writes
            raise ConfigError(problem, on_every_rank=True)
        self._records: Records = {}
        for records in gather_objects(read_records(self._path)):
            self._records |= records
        for (kind, example), record in self._records.items():
            check_record(kind, record, f"{self._path}, the stored prediction of example {example}")
        self._resumed = frozenset(self._records)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.skip_answered(
            {kind: {example for k, example in self._records if k == kind} for kind in data.answered}
        )

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first forward, check that earlier predictions belong to the same evaluation."""
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._identity = evaluation_identity(module, data)
        if "generation" in data.evaluate_by and data.free_text:
            if problem := bert_layer_problem(self.bert_model, self.bert_layer):
                raise ConfigError(f"evaluation.bert_layer: {problem}")
            self._identity["bert_score"] = f"{self.bert_model}, layer {self.bert_layer}"
        path = self._path / IDENTITY_FILE
        stored = trainer.strategy.broadcast(self._stored_identity)
        if self._records or stored is not None:
            check_identity(self._path, stored, self._identity)
        elif trainer.is_global_zero:
            write_text(path, json.dumps(self._identity, indent=2) + "\n")
        if "generation" in data.evaluate_by and trainer.is_global_zero:
            _warn_about_long_answers(data.tables["test"], module.decoding.max_new_tokens)
        trainer.strategy.barrier()
        self._part = PartFile(self._path, trainer.global_rank)
        self._skipped, self._decides = SkippedTokens(), gates_decide(module.model)
        self._started = time.perf_counter()

    @override
    def on_test_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count which tokens the gates skip, if they decide; not with drafts."""
        module: Any = pl_module
        generates = "labels" not in batch
        # With drafts, the first forward pass may also read random tokens.
        if self._decides and not (generates and module.drafter is not None):
            self._counting.enter_context(
                counting_skipped_tokens(module.model, self._skipped, first_pass_only=generates)
            )

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop counting in the batch that failed."""
        self._counting.close()

    @override
    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the predictions of one batch."""
        self._counting.close()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(outputs, Mapping)
        records: Records = {}
        if "generated" in outputs:
            labels, golds = data.tables["test"]["labels"], data.tables["test"]["gold"]
            for example, ids in zip(batch["example_ids"].tolist(), outputs["generated"], strict=True):
                if example >= 0:
                    text = data.tokenizer.decode(ids, skip_special_tokens=True)
                    found = (
                        TextWithReference(text.strip(), labels[example][golds[example]])
                        if data.free_text
                        else GeneratedAnswer(text, *data.parse_answer(text, labels[example]))
                    )
                    records["generation", example] = generation_record(found)
        else:
            for question in ranked_questions(batch, outputs["log_likelihoods"], outputs["tokens"]):
                records["likelihood", question.example] = likelihood_record(question)
        if records:
            self._part.write(records)
            self._records |= records

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge the predictions of all ranks, then log, print and save the results."""
        seconds = time.perf_counter() - self._started
        result = self._merge(trainer)
        for measure in result.measures:
            name = "accuracy_generation" if measure == "generation" else f"accuracy_{measure}"
            pl_module.log(f"test/{name}", result.average(measure).value, rank_zero_only=True)
        if result.gold_loss is not None:
            pl_module.log("test/loss", result.gold_loss, rank_zero_only=True)
        for metric, value in result.text_metrics().items():
            pl_module.log(f"test/{metric}", value, rank_zero_only=True)
        skipped = self._skipped.shares()
        module: Any = pl_module
        drafts = report_drafts(module.drafter, is_first_rank=trainer.is_global_zero)
        if trainer.is_global_zero:
            print_results(result, ranking=trainer.datamodule.ranking)  # type: ignore[attr-defined]
            if skipped:
                SafeConsole(soft_wrap=True).print(
                    Text(f"tokens skipped by gates: {describe_shares(skipped)}")
                )
            measured = {"skipped_tokens": skipped, "drafts": drafts}
            self._write_summary(trainer, pl_module, result, seconds, measured)
            SafeConsole(soft_wrap=True).print(Text(f"every prediction: {self._path / PREDICTIONS_FILE}"))

    @override
    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge the predictions of all ranks."""
        result = self._merge(trainer)
        module: Any = pl_module
        report_drafts(module.drafter, is_first_rank=trainer.is_global_zero)
        if trainer.is_global_zero:
            message = f"{len(result.examples)} predictions: {self._path / PREDICTIONS_FILE}"
            SafeConsole(soft_wrap=True).print(Text(message))

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end

    def _prepare_folder(self) -> str:
        """Create the evaluation folder and read what it holds; return why it cannot be used, if it cannot."""
        if problem := folder_problem(self._path):
            return (
                f"evaluation.folder: {self._path} cannot be written ({problem}); "
                "accepted: a folder with room for the results"
            )
        self._path.mkdir(parents=True, exist_ok=True)
        # Without an identity file, the files there do not come from an evaluation: do not delete them.
        if self.folder is None and (self._path / IDENTITY_FILE).is_file():
            delete_predictions(self._path)
        try:
            self._stored_identity = read_object(self._path / IDENTITY_FILE)
            self._stored_summary = (read_object(self._path / SUMMARY_FILE) or {}) if self.folder else {}
        except ConfigError as error:
            return f"{error}; delete the file, or choose another evaluation.folder"
        return ""

    def _merge(self, trainer: L.Trainer) -> EvaluationResult:
        """Collect the predictions of all ranks on all ranks; rank 0 writes the file. A collective.

        Raises:
            RuntimeError: Two ranks predicted the same example.
        """
        self._part.close()
        own = {key: record for key, record in self._records.items() if key not in self._resumed}
        computed: Records = {}
        for records in gather_objects(own):  # the same on every rank, so that all ranks raise or none
            if twice := computed.keys() & records.keys():
                raise RuntimeError(
                    f"{len(twice)} examples were predicted by two ranks, {min(twice)} among them"
                )
            computed |= records
        self._records |= computed
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        table = data.tables["test"]
        examples = []
        for example in table.select_columns(["task", "example", "key", "gold"]):
            keys = {kind: (kind, example["example"]) for kind in data.answered}
            found = {kind: self._records[key] for kind, key in keys.items() if key in self._records}
            if found:
                examples.append(example | found)
        examples.sort(key=lambda example: (example["task"], example["example"]))
        skipped = score_texts(
            [example["generation"] for example in examples if "generation" in example],
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            bert_model=self.bert_model,
            bert_layer=self.bert_layer,
        )
        if trainer.is_global_zero:
            write_predictions(self._path, examples)
        trainer.strategy.barrier()
        self.result = EvaluationResult(examples, len(table), skipped)
        return self.result

    def _write_summary(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        result: EvaluationResult,
        seconds: float,
        measured: dict[str, dict[str, Any]],
    ) -> None:
        path = self._path / SUMMARY_FILE
        computed = len(self._records) - len(self._resumed)
        # A run that only read predictions keeps the record of the run that computed them.
        record = self._stored_summary
        if computed or not record:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            record = evaluation_record(trainer, pl_module, data) | {
                "identity": self._identity,
                "wall_seconds": seconds,
                "resumed_predictions": len(self._resumed),
                "computed_predictions": computed,
                **{name: figures for name, figures in measured.items() if figures},
            }
        write_text(path, json.dumps(record | result.summary(), indent=2, default=str) + "\n")


def _warn_about_long_answers(table: Dataset, limit: int) -> None:
    """Warn about correct answers that are too long to be generated."""
    long = Counter(
        example["task"]
        for example in table.select_columns(["task", "answers", "gold"])
        if len(example["answers"][example["gold"]]) > limit
    )
    if long:
        by_task = ", ".join(f"{task} {count}" for task, count in sorted(long.items()))
        log.warning(
            "%d of %d correct answers are longer than model.decoding.max_new_tokens %d and cannot be "
            "generated completely (%s)",
            long.total(),
            len(table),
            limit,
            by_task,
        )
