"""Distinct names for the runs of a comparison."""

from collections.abc import Sequence
from pathlib import Path

from gatera_lightning.evaluation.prediction_files import PREDICTIONS_FILE
from gatera_lightning.evaluation.recorded_run import RecordedRun


def run_labels(runs: Sequence[RecordedRun]) -> list[str]:
    """Name every run by its method, or by its folder where the method is unknown.

    Runs that would share a name also get as many parts of their paths as it takes to distinguish them.
    """
    # A predictions file with another name is named like a folder: its folder may hold several of them.
    paths = [run.path.resolve() for run in runs]
    places = [path.parent if path.name == PREDICTIONS_FILE else path for path in paths]
    names = [run.method or place.name for run, place in zip(runs, places, strict=True)]
    if len(set(names)) == len(names):
        return names
    tails = _distinct_tails(places)
    return [
        name if names.count(name) == 1 else f"{name} ({tail})" if run.method else tail
        for run, name, tail in zip(runs, names, tails, strict=True)
    ]


def _distinct_tails(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as make all of them distinct."""
    longest = max(len(path.parts) for path in paths)
    length = next(n for n in range(1, longest + 1) if len({path.parts[-n:] for path in paths}) == len(paths))
    return [Path(*path.parts[-length:]).as_posix() for path in paths]
