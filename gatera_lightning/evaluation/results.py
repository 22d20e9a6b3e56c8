"""Results of one evaluation: accuracies by every way of reading an answer, loss, and metrics of generated text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gatera_lightning.evaluation.intervals import Average, Proportion
from gatera_lightning.evaluation.text_metrics import corpus_metrics

SUMMARY = "test_results.json"

Measure = Literal["sum", "per_token", "per_character", "generation"]
LABELS: dict[Measure, str] = {
    "sum": "likelihood, summed",
    "per_token": "likelihood, per token",
    "per_character": "likelihood, per character",
    "generation": "generation",
}


@dataclass(frozen=True)
class EvaluationResult:
    """Predictions of one split: rows as :func:`prediction_rows` makes them, and how many the split has."""

    rows: Sequence[Mapping[str, Any]]
    expected: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Metrics of text that could not be computed, and why."""

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order in which they were met."""
        return list(dict.fromkeys(row["task"] for row in self.rows))

    @property
    def measures(self) -> list[Measure]:
        """What these predictions can be judged by."""
        return [measure for measure in LABELS if any(_judges(measure, row) for row in self.rows)]

    def accuracy(self, measure: Measure, task: str | None = None) -> Proportion:
        """Share of questions answered right, of one task or of all rows; no answer is a wrong one."""
        choices = [
            (
                row["generation"]["choice"]
                if measure == "generation"
                else row["likelihood"]["choice"][measure],
                row["gold"],
            )
            for row in self.rows
            if task in (None, row["task"]) and _judges(measure, row)
        ]
        return Proportion(sum(choice == gold for choice, gold in choices), len(choices))

    def average(self, measure: Measure) -> Average:
        """Mean over tasks of their accuracies, each task counting alike, as the papers report it.

        A task without a row that the measure can judge is left out.
        """
        found = (self.accuracy(measure, task) for task in self.tasks)
        return Average(tuple(share for share in found if share.n))

    def unanswered(self, task: str | None = None) -> int:
        """Generated texts without an answer in them."""
        return sum(
            row["generation"]["answer"] is None
            for row in self.rows
            if task in (None, row["task"]) and _judges("generation", row)
        )

    @property
    def counts(self) -> dict[str, int]:
        """Rows by the way they were evaluated, for each way that was used."""
        found = {kind: sum(kind in row for row in self.rows) for kind in ("likelihood", "generation")}
        return {kind: count for kind, count in found.items() if count}

    @property
    def gold_loss(self) -> float | None:
        """Mean nats per token of the right answers, over all their tokens; None without likelihoods."""
        judged = [(row["likelihood"], row["gold"]) for row in self.rows if "likelihood" in row]
        if not judged:
            return None
        tokens = sum(found["tokens"][gold] for found, gold in judged)
        return float(-sum(found["log_likelihoods"][gold] for found, gold in judged) / max(1, tokens))

    @property
    def perplexity(self) -> float | None:
        """``exp`` of :attr:`gold_loss`; infinite where no float holds it."""
        if self.gold_loss is None:
            return None
        return math.exp(self.gold_loss) if self.gold_loss < 700 else math.inf

    def text_metrics(self, task: str | None = None) -> dict[str, float]:
        """Metrics of the texts of one task, or of all rows, against their references; {} where texts have none."""
        texts = [
            row["generation"]
            for row in self.rows
            if task in (None, row["task"]) and "reference" in row.get("generation", ())
        ]
        if not texts:
            return {}
        means = {
            name: sum(text["scores"][name] for text in texts) / len(texts) for name in texts[0]["scores"]
        }
        return (
            means | corpus_metrics([text["text"] for text in texts], [text["reference"] for text in texts])[0]
        )

    def summary(self) -> dict[str, Any]:
        """Every number, as ``test_results.json`` holds it."""
        tasks: dict[str, Any] = {}
        for task in self.tasks:
            accuracies = {measure: self.accuracy(measure, task) for measure in self.measures}
            tasks[task] = {
                measure: {"n": found.n, "accuracy": _finite(found.value), "interval": _limits(found.interval)}
                for measure, found in accuracies.items()
            }
            if "generation" in accuracies:
                tasks[task]["generation"]["unanswered"] = self.unanswered(task)
            if text := self.text_metrics(task):
                tasks[task]["text"] = text
        averages = {measure: self.average(measure) for measure in self.measures}
        return {
            "rows": len(self.rows),
            "rows_of_split": self.expected,
            "tasks": tasks,
            "average": {
                m: {"accuracy": _finite(found.value), "interval": _limits(found.interval)}
                for m, found in averages.items()
            },
            "nats_per_target_token": self.gold_loss,
            "perplexity": None if self.perplexity is None else _finite(self.perplexity),
            "text": self.text_metrics(),
            "text_skipped": dict(self.skipped),
        }


def _judges(measure: Measure, row: Mapping[str, Any]) -> bool:
    """Whether a row can be right or wrong by a measure: a single candidate always ranks first, and says nothing.

    A text that is compared with a reference is neither.
    """
    if measure == "generation":
        return "choice" in row.get("generation", ())
    return "likelihood" in row and len(row["likelihood"]["tokens"]) > 1


def _finite(value: float) -> float | None:
    """A number as JSON has it, which knows neither NaN nor infinity: None for what no row says, or no float holds."""
    return value if math.isfinite(value) else None


def _limits(interval: tuple[float, float]) -> list[float | None]:
    return [_finite(limit) for limit in interval]
