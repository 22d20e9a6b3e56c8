"""Which runs there are, in which order, and which of them the ledger lacks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.quality.families import FAMILIES, MEASURED
from benchmarks.quality.ledger import Line
from benchmarks.quality.methods import METHODS, MORE_SEEDS, RATE_FACTOR, Method

Stage = Literal["untrained", "rates", "seeds"]

RATE_SEED = 0
"""Seed of the runs that choose the learning rate."""

RATE_LIMITS = (1e-5, 2.0)
"""The search for a rate ends here, even if the best one is the last."""

CPU_SECONDS = {"untrained": 60.0, "rates": 60.0, "seeds": 100.0}
"""Cost of a run where the ledger has none of its stage to go by."""


@dataclass(frozen=True)
class Run:
    """One run; these fields identify it."""

    family: str

    stage: Stage

    method: str
    """``untrained`` for the backbone as it is."""

    lr: float | None
    """Peak learning rate; None for the untrained model, and in a forecast for a rate not chosen yet."""

    seed: int

    @classmethod
    def of(cls, line: Line) -> "Run":
        """Return the run that a line of the ledger holds."""
        return cls(line["family"], line["stage"], line["method"], line["lr"], line["seed"])


@dataclass(frozen=True)
class Selection:
    """Which runs are wanted."""

    families: Sequence[str] = tuple(FAMILIES)

    methods: Sequence[str] = tuple(METHODS)

    stages: Sequence[str] = ("rates", "seeds")

    seeds: Sequence[int] = MORE_SEEDS


def missing_runs(lines: Sequence[Line], selection: Selection) -> list[Run]:
    """Return the runs that can start now, in their order; more can follow when these are finished."""
    return [run for run in forecast(lines, selection) if run.lr is not None or run.stage == "untrained"]


def forecast(lines: Sequence[Line], selection: Selection) -> list[Run]:
    """Return all runs that are missing; the rate is None where it is not chosen yet."""
    done = {Run.of(line) for line in lines}
    return [run for run in _wanted(lines, selection) if run not in done]


def _wanted(lines: Sequence[Line], selection: Selection) -> Iterator[Run]:
    """Yield all wanted runs in order; the rate is None where it is not chosen yet."""
    for family in MEASURED:  # what is forgotten is measured on all that is not trained on
        yield Run(family, "untrained", "untrained", None, RATE_SEED)
    for family in (name for name in FAMILIES if name in selection.families):
        methods = [
            method
            for name, method in METHODS.items()
            if name in selection.methods and family in method.families
        ]
        if "rates" in selection.stages:
            searches = {method.name: rates_to_try(lines, family, method) for method in methods}
            # The middle of the first grid first, so that an unfinished search has something of every method.
            for position in range(max(map(len, searches.values()), default=0)):
                for name, rates in searches.items():
                    if position < len(rates):
                        yield Run(family, "rates", name, rates[position], RATE_SEED)
        if "seeds" in selection.stages:
            chosen = {method.name: chosen_rate(lines, family, method) for method in methods}
            for seed in selection.seeds:
                for name, rate in chosen.items():
                    if seed in METHODS[name].seeds:
                        yield Run(family, "seeds", name, rate, seed)


def rates_to_try(lines: Sequence[Line], family: str, method: Method) -> list[float]:
    """Return the rates that a method tries: its first grid, from the middle, and one beyond a best edge.

    Empty for a method that takes over the rate of another.
    """
    if not method.rates:
        return []
    grid = list(method.rates)
    middle = len(grid) // 2
    first = [grid[middle], *grid[:middle], *grid[middle + 1 :]]
    losses = rate_curve(lines, family, method.name)
    tried = first + sorted(set(losses) - set(first))
    if not set(first) <= set(losses):
        return tried
    best = min(losses, key=losses.__getitem__)
    if best == min(losses):
        beyond = best / RATE_FACTOR
    elif best == max(losses):
        beyond = best * RATE_FACTOR
    else:
        return tried
    return [*tried, float(f"{beyond:.6g}")] if RATE_LIMITS[0] <= beyond <= RATE_LIMITS[1] else tried


def rate_curve(lines: Sequence[Line], family: str, method: str) -> dict[float, float]:
    """Return the loss on validation rows by learning rate; infinite for a run that diverged."""
    return {
        line["lr"]: math.inf if line["validation"] is None else line["validation"]
        for line in lines
        if (line["family"], line["stage"], line["method"]) == (family, "rates", method)
    }


def chosen_rate(lines: Sequence[Line], family: str, method: Method) -> float | None:
    """Return the rate with the lowest loss on validation rows; None while the search goes on."""
    searched = METHODS[method.rate_of] if method.rate_of else method
    losses = rate_curve(lines, family, searched.name)
    if not losses or not set(rates_to_try(lines, family, searched)) <= set(losses):
        return None
    best = min(losses, key=losses.__getitem__)
    return best if math.isfinite(losses[best]) else None


def cpu_seconds(lines: Sequence[Line], run: Run) -> float:
    """Predict the CPU seconds of a run: the mean of its method's runs in the ledger, else of its stage's."""
    same_stage = [line for line in lines if (line["family"], line["stage"]) == (run.family, run.stage)]
    same_method = [line for line in same_stage if line["method"] == run.method]
    found = same_method or same_stage or [line for line in lines if line["stage"] == run.stage]
    seconds = [line["cost"]["cpu_seconds"] for line in found]
    return sum(seconds) / len(seconds) if seconds else CPU_SECONDS[run.stage]
