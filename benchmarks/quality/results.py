"""What the ledger says about the methods in one family: their means, trajectories and differences."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.comparisons import QUESTIONS, Question
from benchmarks.quality.families import FAMILIES, MEASURED
from benchmarks.quality.ledger import Line
from benchmarks.quality.methods import SEEDS
from benchmarks.quality.statistics import Comparison, Part, compare, correct_for_number

Measure = Literal["heldout", "accuracy", "retention"]


@dataclass(frozen=True)
class TrajectoryPoint:
    """The mean over seeds of what a method had reached after some steps, on the first test rows."""

    step: int

    heldout: float
    """Loss on the family that is trained on, nats per token."""

    forgotten: float
    """Increase of the loss on what is not trained on, averaged over its kinds, nats per token."""


@dataclass(frozen=True)
class FamilyResults:
    """The lines of one family's tested runs, and of the untrained model in all families."""

    family: str

    lines: Sequence[Line]
    """All lines of the ledger."""

    @cached_property
    def untrained(self) -> dict[str, Line]:
        """The line of the untrained model by family."""
        return {line["family"]: line for line in self.lines if line["stage"] == "untrained"}

    @cached_property
    def runs(self) -> dict[str, dict[int, Line]]:
        """The tested runs by method and seed, without those that diverged."""
        found: dict[str, dict[int, Line]] = {}
        for line in self._tested_lines:
            if line["test"] is not None:
                found.setdefault(line["method"], {})[line["seed"]] = line
        return found

    @cached_property
    def level_runs(self) -> dict[str, dict[int, Line]]:
        """Those of the tested runs whose seeds all methods have, for tables with a line for each method.

        Differences are paired by seed, and use all of ``runs``.
        """
        shared = {
            method: {seed: line for seed, line in by_seed.items() if seed in SEEDS}
            for method, by_seed in self.runs.items()
        }
        return {method: by_seed for method, by_seed in shared.items() if by_seed}

    @cached_property
    def diverged(self) -> Counter[str]:
        """How many tested runs of a method diverged."""
        return Counter(line["method"] for line in self._tested_lines if line["test"] is None)

    @property
    def _tested_lines(self) -> list[Line]:
        return [line for line in self.lines if (line["family"], line["stage"]) == (self.family, "seeds")]

    @property
    def others(self) -> list[str]:
        """What is not trained on: the other families, and general text."""
        return [name for name in MEASURED if name != self.family]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is compared in this family."""
        return ("heldout", "accuracy", "retention") if self.has_accuracy else ("heldout", "retention")

    @property
    def has_accuracy(self) -> bool:
        """Whether rows have wrong candidates."""
        return FAMILIES[self.family].has_candidates

    def seeds(self, *methods: str) -> list[int]:
        """Return the seeds that all of these methods have, in order."""
        return sorted(set.intersection(*(set(self.runs.get(method, {})) for method in methods)))

    def values(self, method: str, measure: Measure) -> list[Part]:
        """Return a method's values in ``level_runs``: one part, or for retention one by other family.

        Retention is the loss minus the untrained model's.
        """
        return self._parts(method, sorted(self.level_runs[method]), measure)

    def answers(self, measure: Measure) -> dict[Question, Comparison]:
        """Compare the methods of every question on the seeds that both have; p-values are adjusted together.

        Questions whose methods share no seed are left out.
        """
        return _corrected(
            {
                question: compare(self.differences(question, measure, seeds))
                for question in QUESTIONS
                if (seeds := self.seeds(question.method, question.reference))
            }
        )

    def differences(self, question: Question, measure: Measure, seeds: Sequence[int]) -> list[Part]:
        """Return method − reference of each row: one part, or for retention one by other family."""
        pairs = zip(
            self._parts(question.method, seeds, measure),
            self._parts(question.reference, seeds, measure),
            strict=True,
        )
        return [Part(one.values - other.values, one.weights, one.rows) for one, other in pairs]

    def _parts(self, method: str, seeds: Sequence[int], measure: Measure) -> list[Part]:
        lines = [self.runs[method][seed] for seed in seeds]
        own = self.untrained[self.family]["test"]
        if measure == "heldout":
            sums = _matrix([line["test"]["sums"] for line in lines])
            return [Part(sums, _vector(own["tokens"]), self.family)]
        if measure == "accuracy":
            correct = [[float(bit) for bit in line["test"]["correct"]] for line in lines]
            return [Part(_matrix(correct), np.ones(len(own["tokens"])), self.family)]
        parts = []
        for other in self.others:
            sums = _matrix([line["retention"][other]["sums"] for line in lines])  # (seeds, rows)
            before = self.untrained[other]["retention"]
            parts.append(Part(sums - _vector(before["sums"]), _vector(before["tokens"]), other))
        return parts

    def trajectory(self, method: str) -> list[TrajectoryPoint]:
        """Return the points of a method's training in ``level_runs``, from the untrained model on."""
        start = self._start()
        by_step: dict[int, list[Line]] = {}
        for line in self.level_runs[method].values():
            for point in line["trajectory"]:
                by_step.setdefault(point["step"], []).append(point)
        points = [TrajectoryPoint(0, start["heldout"], 0.0)]
        for step, found in sorted(by_step.items()):
            forgotten = [point["retention"][other] - start[other] for point in found for other in self.others]
            heldout = sum(point["heldout"] for point in found) / len(found)
            points.append(TrajectoryPoint(step, heldout, sum(forgotten) / len(forgotten)))
        return points

    def _start(self) -> dict[str, float]:
        """The untrained model's loss on the trajectory's rows: under ``heldout``, and by other family."""

        def loss(family: str, measure: str) -> float:
            found, rows = self.untrained[family][measure], MEASURED[family].probe_rows
            return float(sum(found["sums"][:rows]) / sum(found["tokens"][:rows]))

        others = {other: loss(other, "retention") for other in self.others}
        return {"heldout": loss(self.family, "test")} | others


def answers_over_families(families: Sequence[FamilyResults], measure: Measure) -> dict[Question, Comparison]:
    """Compare the methods of every question by the mean of their differences in several families.

    Seeds are paired across families, too: a seed draws the same adapter in all of them. Questions whose
    methods share no seed in all families are left out.
    """
    found = {}
    for question in QUESTIONS:
        seeds = set.intersection(
            *(set(family.seeds(question.method, question.reference)) for family in families)
        )
        if seeds:
            parts = (family.differences(question, measure, sorted(seeds)) for family in families)
            found[question] = compare([part for family in parts for part in family])
    return _corrected(found)


def _corrected(found: dict[Question, Comparison]) -> dict[Question, Comparison]:
    return dict(zip(found, correct_for_number(list(found.values())), strict=True))


def forgotten_at(points: Sequence[TrajectoryPoint], heldout: float) -> float | None:
    """Return the increase of the loss elsewhere when training first reached a held-out loss; None if never.

    Interpolates linearly between the points of the trajectory.
    """
    for before, after in pairwise(points):
        if after.heldout <= heldout <= before.heldout:
            share = (before.heldout - heldout) / (before.heldout - after.heldout or 1.0)
            return before.forgotten + share * (after.forgotten - before.forgotten)
    return None


def _matrix(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.array(rows, dtype=np.float64)


def _vector(values: Sequence[float]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)
