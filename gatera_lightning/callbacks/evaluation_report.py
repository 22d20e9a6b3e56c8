"""Evaluation on disk: predictions as they come, then a table to read and JSON to keep."""

import importlib.metadata
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from rich.console import Console
from rich.text import Text
from torch import Tensor
from typing_extensions import override

from gatera_lightning.adapters.identity import adapter_identity, backbone_identity
from gatera_lightning.backbone.source import expand_path
from gatera_lightning.checkpointing.atomic_files import write_text
from gatera_lightning.datamodules.tokenization.cache import data_hash
from gatera_lightning.distributed.gather import gather_objects
from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.identity import FORMAT_VERSION, IDENTITY_FILE, check_identity
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
from gatera_lightning.evaluation.results import SUMMARY_FILE, EvaluationResult
from gatera_lightning.evaluation.results_table import print_results
from gatera_lightning.evaluation.text_metrics import (
    EXAMPLE_METRICS,
    ExampleScores,
    bert_layer_problem,
    corpus_metrics,
    example_scores,
)

log = logging.getLogger(__name__)

_PACKAGES = ("gatera-lightning", "torch", "lightning", "transformers")


class EvaluationReport(L.Callback):
    """Writes ``predictions.jsonl`` (a line a question), and after ``test`` prints a table and writes ``test_results.json``.

    Every batch is on disk when it is computed. Given a ``folder``, a run that was killed goes on where it stopped, on
    any number of processes, and ends with the same files. ``result`` keeps the last one for whoever runs the Trainer.
    """

    def __init__(
        self, folder: str | None = None, bert_model: str = "roberta-large", bert_layer: int = 17
    ) -> None:
        """Where predictions go, and whether earlier ones are kept.

        Args:
            folder: Folder of the evaluation; what it holds is not computed again. null: the run's log folder, anew.
            bert_model: The model of BERTScore, a hub id that was downloaded before, or a folder; without it the metric is
                skipped, and the report says so.
            bert_layer: The layer of it that is compared; 17 is its authors' choice for roberta-large.
        """
        if bert_layer < 1:
            raise ValueError(f"evaluation.bert_layer: {bert_layer}; accepted: an integer of at least 1")
        self.folder = folder
        self.bert_model = bert_model
        self.bert_layer = bert_layer
        self.result: EvaluationResult | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the data what need not be computed again; before the loaders are built."""
        if stage not in ("test", "predict"):
            return
        log_folder = trainer.log_dir or trainer.default_root_dir  # log_dir is a broadcast: every rank asks
        self._path = Path(log_folder if self.folder is None else expand_path(self.folder))
        if trainer.is_global_zero:
            self._path.mkdir(parents=True, exist_ok=True)
            if (
                self.folder is None and (self._path / IDENTITY_FILE).is_file()
            ):  # else the files are not ours to drop
                delete_predictions(self._path)
        trainer.strategy.barrier()
        self._records: Records = {}
        for records in gather_objects(read_records(self._path)):
            self._records |= records
        self._resumed = frozenset(self._records)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.skip_answered({kind: {row for k, row in self._records if k == kind} for kind in data.answered})

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to mix evaluations; before the first forward."""
        module, data = _parts(trainer, pl_module)
        self._identity = {
            "format": FORMAT_VERSION,
            "backbone": backbone_identity(module.model),
            "adapter": adapter_identity(module.model),
            "method": {
                name: getattr(module.adapter, name) for name in ("update", "gate", "scale")
            },  # in no tensor
            "data": data_hash(data.tables["test"]),
            "dtype": str(module.model.get_input_embeddings().weight.dtype).removeprefix(
                "torch."
            ),  # what auto came to
            "attn_implementation": module.backbone.attn_implementation,
            "decoding": asdict(module.decoding),
        }
        if "generation" in data.evaluate_by and data.free_text:
            if problem := bert_layer_problem(self.bert_model, self.bert_layer):
                raise ConfigError(f"evaluation.bert_layer: {problem}")
            self._identity["bert_score"] = f"{self.bert_model}, layer {self.bert_layer}"
        path = self._path / IDENTITY_FILE
        stored = json.loads(path.read_text()) if path.is_file() and trainer.is_global_zero else None
        stored = trainer.strategy.broadcast(stored)
        if self._records or stored is not None:
            check_identity(self._path, stored, self._identity)
        elif trainer.is_global_zero:
            write_text(path, json.dumps(self._identity, indent=2) + "\n")
        if "generation" in data.evaluate_by and trainer.is_global_zero:
            _warn_of_long_answers(data.tables["test"], module.decoding.max_new_tokens)
        trainer.strategy.barrier()
        self._part = PartFile(self._path, trainer.global_rank)
        self._started = time.perf_counter()

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
        """Keep one batch."""
        _, data = _parts(trainer, pl_module)
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
        """Merge what every process found, then say it."""
        seconds = time.perf_counter() - self._started
        result = self._merge(trainer, pl_module)
        for measure in result.measures:
            name = "accuracy_generation" if measure == "generation" else f"accuracy_{measure}"
            pl_module.log(f"test/{name}", result.average(measure).value, rank_zero_only=True)
        if result.gold_loss is not None:
            pl_module.log("test/loss", result.gold_loss, rank_zero_only=True)
        for metric, value in result.text_metrics().items():
            pl_module.log(f"test/{metric}", value, rank_zero_only=True)
        if trainer.is_global_zero:
            _, data = _parts(trainer, pl_module)
            print_results(result, ranking=data.ranking)
            stored = (
                json.loads((self._path / SUMMARY_FILE).read_text()) if (self._path / SUMMARY_FILE).is_file() else {}
            )
            computed = len(self._records) - len(self._resumed)
            about = (
                stored  # the record of the run that computed the predictions, where this one only read them
            )
            if computed or not stored:
                about = _about(trainer, *_parts(trainer, pl_module)) | {
                    "identity": self._identity,
                    "wall_seconds": seconds,
                }
                about |= {"resumed_predictions": len(self._resumed), "computed_predictions": computed}
            write_text(
                self._path / SUMMARY_FILE, json.dumps(about | result.summary(), indent=2, default=str) + "\n"
            )
            Console(soft_wrap=True).print(Text(f"every prediction: {self._path / PREDICTIONS_FILE}"))

    @override
    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge what every process found."""
        result = self._merge(trainer, pl_module)
        if trainer.is_global_zero:
            Console(soft_wrap=True).print(
                Text(f"{len(result.examples)} predictions: {self._path / PREDICTIONS_FILE}")
            )

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end

    def _merge(self, trainer: L.Trainer, pl_module: L.LightningModule) -> EvaluationResult:
        """The rows of every process, on all of them; rank 0 writes the file. A collective.

        Raises RuntimeError when two processes predicted the same row.
        """
        self._part.close()
        own = {key: record for key, record in self._records.items() if key not in self._resumed}
        found: Records = {}
        for records in gather_objects(own):  # the same on every rank, so that all raise or none
            if twice := found.keys() & records.keys():
                raise RuntimeError(
                    f"{len(twice)} rows were predicted by two processes, {min(twice)} among them"
                )
            found |= records
        self._records |= found
        _, data = _parts(trainer, pl_module)
        table = data.tables["test"]
        rows = []
        for question in table.select_columns(["task", "example", "key", "gold"]):
            keys = {kind: (kind, question["example"]) for kind in data.answered}
            found = {kind: self._records[key] for kind, key in keys.items() if key in self._records}
            if found:
                rows.append(question | found)
        rows.sort(key=lambda row: (row["task"], row["example"]))
        skipped = self._compare_texts(trainer, [row["generation"] for row in rows if "generation" in row])
        if trainer.is_global_zero:
            write_predictions(self._path, rows)
        trainer.strategy.barrier()
        self.result = EvaluationResult(rows, len(table), skipped)
        return self.result

    def _compare_texts(self, trainer: L.Trainer, generations: list[dict[str, Any]]) -> dict[str, str]:
        """Put ``scores`` beside every text with a reference, each process those of its share; what could not be and why.

        What an earlier run found of all texts is kept, and what it lacked is tried again: a metric whose library has come since
        costs no new generation, and one whose library is gone stays. A collective.
        """
        texts = [generation for generation in generations if "reference" in generation]
        if not texts:
            return {}
        known = [name for name in EXAMPLE_METRICS if all(name in text.get("scores", ()) for text in texts)]
        share = texts[trainer.global_rank :: trainer.world_size]
        own = example_scores(
            [text["text"] for text in share],
            [text["reference"] for text in share],
            known=known,
            bert_model=self.bert_model,
            bert_layer=self.bert_layer,
        )
        parts: list[ExampleScores] = gather_objects(own)
        names = [name for name in EXAMPLE_METRICS if name in known or all(name in part.values for part in parts)]
        for rank, part in enumerate(parts):
            for number, text in enumerate(texts[rank :: len(parts)]):
                text["scores"] = {
                    name: text["scores"][name] if name in known else part.values[name][number]
                    for name in names
                }
        skipped = {name: reason for part in parts for name, reason in part.skipped.items()}
        return skipped | corpus_metrics([], [])[1]


def _parts(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[Any, Any]:
    return pl_module, trainer.datamodule  # type: ignore[attr-defined]


def _about(trainer: L.Trainer, module: Any, data: Any) -> dict[str, Any]:
    """What one needs to know to repeat an evaluation."""
    return {
        "model": {
            "backbone": asdict(module.backbone),
            "adapter": module.adapter.to_flat_dict(),
            "decoding": asdict(module.decoding),
            "adapter_from": _origin(trainer, module),
        },
        "data": dict(data.hparams),
        "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _warn_of_long_answers(table: Dataset, limit: int) -> None:
    """An answer that cannot be finished cannot be right: say how many there are."""
    long = Counter(
        row["task"]
        for row in table.select_columns(["task", "answers", "gold"])
        if len(row["answers"][row["gold"]]) > limit
    )
    if long:
        by_task = ", ".join(f"{task} {count}" for task, count in sorted(long.items()))
        log.warning(
            "%d of %d right answers are longer than model.decoding.max_new_tokens %d and will be cut (%s)",
            long.total(),
            len(table),
            limit,
            by_task,
        )


def _origin(trainer: L.Trainer, module: Any) -> str:
    """Where the adapter's values come from."""
    if trainer.ckpt_path:
        return str(trainer.ckpt_path)
    return "this run" if trainer.global_step else module.warm_start or "untrained"
