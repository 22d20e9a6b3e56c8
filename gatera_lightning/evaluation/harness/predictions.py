"""The samples of lm-eval as the predictions that ``compare`` reads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gatera_lightning.evaluation.harness.model import GateRALM, is_local
from gatera_lightning.evaluation.likelihood_ranking import RankedQuestion
from gatera_lightning.evaluation.predictions import (
    GeneratedAnswer,
    Kind,
    TextWithReference,
    generation_record,
    likelihood_record,
)

_RIGHT_OR_WRONG = ("exact_match", "acc")
"""Metrics that judge one row as right (1) or wrong (0)."""


@dataclass
class HarnessPredictions:
    """What lm-eval's samples are for ``compare``.

    Attributes:
        rows: Kind -> rows as ``predictions.jsonl`` stores them.
        tasks: Kind -> the tasks that the rows are of.
        left_out: Task -> why ``compare`` cannot judge its rows.
    """

    rows: dict[Kind, list[dict[str, Any]]] = field(default_factory=dict)
    tasks: dict[Kind, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def harness_predictions(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Mapping[str, Any], model: GateRALM
) -> HarnessPredictions:
    """Convert the samples of an evaluation.

    A row's key is the digest of its document, so that two adapters are compared on the rows that both
    answered. Rows of local tasks have the task and the key of ``test``.

    Args:
        samples: lm-eval's samples by task.
        tasks: lm-eval's tasks by name.
        model: The model that was evaluated.
    """
    found = HarnessPredictions()
    for name, of_task in samples.items():
        task = tasks[name]
        if not of_task:
            continue
        if task.OUTPUT_TYPE == "multiple_choice":
            rows, reason = _ranked(of_task, task, model)
            kind: Kind = "likelihood"
        else:
            free_text = is_local(of_task[0]["doc"]) and of_task[0]["doc"]["free_text"]
            rows, reason = _compared(of_task) if free_text else _judged(name, of_task)
            kind = "generation"
        if reason:
            found.left_out[name] = reason
        else:
            found.rows.setdefault(kind, []).extend(rows)
            found.tasks.setdefault(kind, []).append(name)
    return found


def _ranked(
    samples: Sequence[Mapping[str, Any]], task: Any, model: GateRALM
) -> tuple[list[dict[str, Any]], str]:
    """Rows of a multiple-choice task, or why it has none."""
    rows = []
    for sample in samples:
        doc = sample["doc"]
        choices = task.doc_to_choice(doc)
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            return [], "a row has more than one correct choice, or none"
        # With acc_mutual_info, the choices follow again without their context.
        scores = tuple(float(found[0]) for found in sample["filtered_resps"][: len(choices)])
        if is_local(doc):
            tokens = tuple(len(ids) for ids in doc["answer_ids"])
        else:
            asked = sample["arguments"][: len(choices)]
            tokens = tuple(model.continuation_tokens(*arguments[:2]) for arguments in asked)
        question = RankedQuestion(sample["doc_id"], gold, scores, tokens, tuple(map(len, choices)))
        rows.append(_row(sample, gold, task.task_name) | {"likelihood": likelihood_record(question)})
    return rows, ""


def _judged(name: str, samples: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Rows of a task whose answers are right or wrong, or why it has none; a task per filter."""
    metric = next((metric for metric in _RIGHT_OR_WRONG if metric in samples[0]["metrics"]), None)
    if metric is None or any(sample.get(metric) not in (0, 1) for sample in samples):
        return [], f"it has no metric that judges a row as right or wrong ({', '.join(_RIGHT_OR_WRONG)})"
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    rows = []
    for sample in samples:
        answer = _first_text(sample["filtered_resps"])
        right = GeneratedAnswer(_first_text(sample["resps"]), answer, 0 if sample[metric] == 1 else None)
        task = name if len(filters) == 1 else f"{name}, {sample['filter']}"
        rows.append(_row(sample, 0, task) | {"generation": generation_record(right)})
    return rows, ""


def _compared(samples: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Rows of a local task whose texts are neither right nor wrong, but have a reference."""
    rows = []
    for sample in samples:
        doc = sample["doc"]
        found = TextWithReference(_first_text(sample["resps"]).strip(), doc["answer"])
        rows.append(_row(sample, doc["gold"], doc["task"]) | {"generation": generation_record(found)})
    return rows, ""


def _row(sample: Mapping[str, Any], gold: int, task: str) -> dict[str, Any]:
    doc = sample["doc"]
    place = {"task": doc["task"], "key": doc["key"]} if is_local(doc) else {"task": task}
    return {"task": task, "example": sample["doc_id"], "key": sample["doc_hash"][:16], "gold": gold} | place


def _first_text(responses: Any) -> str:
    """The first text in lm-eval's nested lists of responses."""
    return next(_texts(responses), "")


def _texts(responses: Any) -> Iterator[str]:
    if isinstance(responses, str):
        yield responses
    elif isinstance(responses, list | tuple):
        for one in responses:
            yield from _texts(one)
