"""Evaluate a model on tasks of lm-eval, and write what ``compare`` reads."""

import hashlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.utils import handle_non_serializable

from gatera_lightning.adapters.identity import adapter_identity, backbone_identity
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.adapters.serialization import read_adapter_config
from gatera_lightning.checkpointing.atomic_files import write_text
from gatera_lightning.evaluation.harness.model import GateRALM, is_local
from gatera_lightning.evaluation.harness.predictions import HarnessPredictions, harness_predictions
from gatera_lightning.evaluation.harness.task_loading import LoadedTasks
from gatera_lightning.evaluation.identity import FORMAT_VERSION, IDENTITY_FILE, check_identity
from gatera_lightning.evaluation.json_objects import read_object
from gatera_lightning.evaluation.prediction_files import PREDICTIONS_FILE, write_predictions
from gatera_lightning.evaluation.results import SUMMARY_FILE, EvaluationResult
from gatera_lightning.evaluation.text_metrics import EXAMPLE_METRICS, corpus_metrics, example_scores

RESULTS_FILE = "harness_results.json"
_SEED = 1234
"""Seed of lm-eval's few-shot examples, its own default."""


@dataclass(frozen=True)
class HarnessSettings:
    """How the tasks are run.

    Attributes:
        num_fewshot: Examples before each question; None takes those of each task.
        limit: Rows of each task: a number, or a share below 1; None for all.
        apply_chat_template: Whether prompts of lm-eval's own tasks are formatted with the model's template.
        local: What local tasks read besides the model.
    """

    num_fewshot: int | None
    limit: float | None
    apply_chat_template: bool
    local: Mapping[str, Any]


def few_shot_problems(tasks: LoadedTasks, num_fewshot: int | None) -> list[str]:
    """Describe each task that is zero-shot by its definition, if few-shot examples are wanted."""
    if not num_fewshot:
        return []
    return [
        f"--num_fewshot: {num_fewshot}, but {name} is zero-shot by its definition; accepted for it: 0, or "
        "leave the flag out"
        for name, task in tasks.by_name.items()
        if task.get_config("num_fewshot") == 0
    ]


def harness_identity(model: GateRALM, tasks: LoadedTasks, settings: HarnessSettings) -> dict[str, Any]:
    """Return everything that the predictions depend on, as ``evaluation.json`` stores it."""
    module, folder = model.adapted_model, model.source.adapter_folder
    config = None if folder is None else read_adapter_config(folder)[0]
    local = any(is_local(doc) for task in tasks.by_name.values() for doc in islice(task.eval_docs, 1))
    return {
        "format": FORMAT_VERSION,
        # A backbone alone has no adapted layers, whose frozen weights the fingerprint is made of.
        "backbone": backbone_identity(module) if adapted_linears(module) else None,
        "harness.backbone": model.source.backbone.id,
        "adapter": None if config is None else adapter_identity(module),
        "method": config and {"update": config.update, "gate": config.gate.kind, "scale": config.scale},
        "data": _data_hash(tasks),
        "dtype": str(module.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "attn_implementation": model.source.backbone.attn_implementation,
        "harness.lm_eval": version("lm_eval"),
        "harness.versions": {name: task.VERSION for name, task in tasks.by_name.items()},
        "harness.num_fewshot": settings.num_fewshot,
        "harness.limit": settings.limit,
        "harness.template": model.template if local or settings.apply_chat_template else None,
        "harness.apply_chat_template": settings.apply_chat_template,
        "harness.max_length": model.max_length,
        "harness.answer_format": settings.local.get("answer_format") if local else None,
    }


def check_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Check that a folder holds no predictions of another evaluation.

    Raises:
        ConfigError: It does; the message lists the differences.
    """
    stored = read_object(folder / IDENTITY_FILE)
    if stored is not None or (folder / PREDICTIONS_FILE).exists():
        # As the file stores it: a tuple is a list there.
        check_identity(folder, stored, json.loads(json.dumps(identity)), setting="--out")


def evaluate(model: GateRALM, tasks: LoadedTasks, settings: HarnessSettings) -> dict[str, Any]:
    """Return what ``lm_eval.evaluate`` returns; its messages go to standard error."""
    random.seed(0)  # the seeds of lm-eval's own command
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    for task in tasks.by_name.values():
        own = task.get_config("num_fewshot")
        task.set_config(
            key="num_fewshot", value=(own or 0) if settings.num_fewshot is None else settings.num_fewshot
        )
        task.set_fewshot_seed(seed=_SEED)
    with redirect_stdout(sys.stderr):
        found = lm_eval.evaluate(
            lm=model,
            task_dict=tasks.for_evaluation,
            limit=settings.limit,
            log_samples=True,
            apply_chat_template=settings.apply_chat_template,
            # `alpaca` has no turns: the examples are part of its instruction.
            fewshot_as_multiturn=settings.apply_chat_template and model.template == "chat",
        )
    assert isinstance(found, dict)  # None on other ranks than the first; there is one
    return found


def write_results(
    folder: Path, found: Mapping[str, Any], model: GateRALM, tasks: LoadedTasks, identity: Mapping[str, Any]
) -> tuple[dict[Path, EvaluationResult], HarnessPredictions]:
    """Write lm-eval's results, and the predictions for ``compare``.

    Rows whose candidates are ranked and rows with generated answers cannot be in one file: where tasks of
    both kinds ran, they go to the subfolders ``likelihood`` and ``generation``.

    Args:
        folder: Where to write.
        found: What :func:`evaluate` returned.
        model: The model.
        tasks: The tasks.
        identity: What :func:`harness_identity` returned.

    Returns:
        The folders for ``compare`` with their results, and the predictions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictions = harness_predictions(found["samples"], tasks.by_name, model)
    results = {name: value for name, value in found.items() if name != "samples"}
    write_text(
        folder / RESULTS_FILE,
        json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n",
    )
    write_text(folder / IDENTITY_FILE, json.dumps(identity, indent=2) + "\n")
    adapter = model.source.adapter_folder
    record = {
        "model": {
            "backbone": model.source.backbone.id,
            "adapter": None if adapter is None else read_adapter_config(adapter)[0].to_flat_dict(),
            "adapter_from": "untrained" if adapter is None else adapter,
        },
        "identity": identity,
        "left_out": predictions.left_out,
        "versions": {
            name: version(name) for name in ("gatera-lightning", "lm_eval", "torch", "transformers")
        },
    }
    places = {}
    for kind, rows in predictions.rows.items():
        place = folder if len(predictions.rows) == 1 else folder / kind
        place.mkdir(exist_ok=True)
        size = sum(found["n-samples"][name]["original"] for name in predictions.tasks[kind])
        result = EvaluationResult(rows, size, score_texts(rows))
        write_predictions(place, rows)
        write_text(place / IDENTITY_FILE, json.dumps(identity, indent=2) + "\n")
        write_text(place / SUMMARY_FILE, json.dumps(record | result.summary(), indent=2, default=str) + "\n")
        places[place] = result
    return places, predictions


def score_texts(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Add ``scores`` to every generated text that has a reference, as ``test`` does.

    Args:
        rows: Rows as ``predictions.jsonl`` stores them. Modified in place.

    Returns:
        The metrics that could not be computed, and why.
    """
    texts = [row["generation"] for row in rows if "reference" in row.get("generation", ())]
    if not texts:
        return {}
    found = example_scores([text["text"] for text in texts], [text["reference"] for text in texts])
    for number, text in enumerate(texts):
        text["scores"] = {
            name: found.values[name][number] for name in EXAMPLE_METRICS if name in found.values
        }
    return found.skipped | corpus_metrics([], [])[1]


def _data_hash(tasks: LoadedTasks) -> str:
    """16 hex digits of the rows of all tasks."""
    digest = hashlib.sha256()
    for name, task in tasks.by_name.items():
        digest.update(name.encode())
        for doc in task.eval_docs:
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
