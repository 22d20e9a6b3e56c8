"""Results of one evaluation: accuracies, cross-entropy loss, and metrics of generated text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gatera_lightning.evaluation.intervals import Average, Proportion
from gatera_lightning.evaluation.predictions import KINDS, Kind
from gatera_lightning.evaluation.text_metrics import corpus_metrics

SUMMARY_FILE = "test_results.json"

Measure = Literal["sum", "per_token", "per_character", "generation"]
"""How a candidate is chosen: by one of the scores of its likelihood, or by the generated text."""

MEASURE_LABELS: dict[Measure, str] = {
    "sum": "likelihood, summed",
    "per_token": "likelihood, per token",
    "per_character": "likelihood, per character",
    "generation": "generation",
}

_MAX_EXPONENT = 700
"""``math.exp`` overflows from about 709.8 on."""


@dataclass(frozen=True)
class EvaluationResult:
    """The predictions of a split and the figures that follow from them.

    Attributes:
        examples: One mapping per evaluated example, as ``predictions.jsonl`` stores it.
        split_size: Number of examples in the split.
        skipped: Text metrics that could not be computed -> reason.
    """

    examples: Sequence[Mapping[str, Any]]
    split_size: int
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order of first appearance."""
        return list(dict.fromkeys(example["task"] for example in self.examples))

    @property
    def measures(self) -> list[Measure]:
        """The measures that can judge at least one example."""
        return [
            measure
            for measure in MEASURE_LABELS
            if any(_can_judge(measure, example) for example in self.examples)
        ]

    @property
    def counts(self) -> dict[Kind, int]:
        """Number of examples evaluated by each kind that was used."""
        found = {kind: sum(kind in example for example in self.examples) for kind in KINDS}
        return {kind: count for kind, count in found.items() if count}

    def accuracy(self, measure: Measure, task: str | None = None) -> Proportion:
        """Share of correct answers; a generated text without an answer is wrong.

        Args:
            measure: How answers are chosen.
            task: The task to count; None counts all examples.
        """
        judged = [example for example in self._of_task(task) if _can_judge(measure, example)]
        return Proportion(
            sum(_choice(measure, example) == example["gold"] for example in judged), len(judged)
        )

    def average(self, measure: Measure) -> Average:
        """Unweighted mean over tasks of their accuracies, as papers report it.

        Tasks in which the measure can judge no example are left out.
        """
        found = (self.accuracy(measure, task) for task in self.tasks)
        return Average(tuple(accuracy for accuracy in found if accuracy.n))

    def unanswered(self, task: str | None = None) -> int:
        """Number of generated texts in which no answer was found, in one task or in all."""
        return sum(
            example["generation"]["answer"] is None
            for example in self._of_task(task)
            if _can_judge("generation", example)
        )

    @property
    def gold_loss(self) -> float | None:
        """Cross-entropy loss of the correct answers, in nats per token over all their tokens.

        None without likelihoods.
        """
        judged = [
            (example["likelihood"], example["gold"]) for example in self.examples if "likelihood" in example
        ]
        if not judged:
            return None
        tokens = sum(found["tokens"][gold] for found, gold in judged)
        return float(-sum(found["log_likelihoods"][gold] for found, gold in judged) / max(1, tokens))

    @property
    def perplexity(self) -> float | None:
        """``exp(gold_loss)``; infinite where a float cannot hold it, None without likelihoods."""
        if self.gold_loss is None:
            return None
        return math.exp(self.gold_loss) if self.gold_loss < _MAX_EXPONENT else math.inf

    def text_metrics(self, task: str | None = None) -> dict[str, float]:
        """Metrics of the generated texts against their references, in one task or in all.

        Returns:
            Name -> value; empty where texts have no references.
        """
        texts = [
            example["generation"]
            for example in self._of_task(task)
            if "reference" in example.get("generation", ())
        ]
        if not texts:
            return {}
        means = {
            name: sum(text["scores"][name] for text in texts) / len(texts) for name in texts[0]["scores"]
        }
        of_corpus, _ = corpus_metrics([text["text"] for text in texts], [text["reference"] for text in texts])
        return means | of_corpus

    def summary(self) -> dict[str, Any]:
        """All figures, as ``test_results.json`` stores them."""
        tasks: dict[str, Any] = {}
        for task in self.tasks:
            accuracies = {measure: self.accuracy(measure, task) for measure in self.measures}
            tasks[task] = {
                measure: {"n": accuracy.n} | _accuracy_fields(accuracy)
                for measure, accuracy in accuracies.items()
            }
            if "generation" in accuracies:
                tasks[task]["generation"]["unanswered"] = self.unanswered(task)
            if text := self.text_metrics(task):
                tasks[task]["text"] = text
        return {
            "rows": len(self.examples),
            "rows_of_split": self.split_size,
            "tasks": tasks,
            "average": {measure: _accuracy_fields(self.average(measure)) for measure in self.measures},
            "nats_per_target_token": self.gold_loss,
            "perplexity": None if self.perplexity is None else _finite_or_none(self.perplexity),
            "text": self.text_metrics(),
            "text_skipped": dict(self.skipped),
        }

    def _of_task(self, task: str | None) -> list[Mapping[str, Any]]:
        return [example for example in self.examples if task in (None, example["task"])]


def _can_judge(measure: Measure, example: Mapping[str, Any]) -> bool:
    """Whether an example can be correct or wrong by a measure.

    A single candidate always ranks first, and a text with a reference is neither correct nor wrong.
    """
    if measure == "generation":
        return "choice" in example.get("generation", ())
    return "likelihood" in example and len(example["likelihood"]["tokens"]) > 1


def _choice(measure: Measure, example: Mapping[str, Any]) -> int | None:
    found: int | None = (
        example["generation"]["choice"]
        if measure == "generation"
        else example["likelihood"]["choice"][measure]
    )
    return found


def _accuracy_fields(accuracy: Proportion | Average) -> dict[str, Any]:
    return {
        "accuracy": _finite_or_none(accuracy.value),
        "interval": [_finite_or_none(limit) for limit in accuracy.interval],
    }


def _finite_or_none(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
