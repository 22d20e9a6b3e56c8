"""Mixtures of tasks: how often the examples of each task occur in an epoch."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gatera_lightning.datamodules.settings import shown
from gatera_lightning.errors import ConfigError


def mix_tasks(tasks: Sequence[str], weights: Mapping[str, float], seed: int) -> list[int]:
    """Return the :func:`mixture_indices` of an epoch in which each task has its share of ``weights``.

    Raises:
        ConfigError: A weighted task has no examples, or its share is less than one example.
    """
    try:
        return mixture_indices(tasks, weights, seed)
    except ValueError as error:
        raise ConfigError(f"data.weights: {error}") from error


def mixture_indices(tasks: Sequence[str], weights: Mapping[str, float], seed: int) -> list[int]:
    """Choose the examples of an epoch so that each task has its share of ``weights``.

    The epoch has as many examples as the tasks with a positive weight have together. A task's examples are
    repeated as often as its share allows, and the remainder is drawn at random; every epoch uses the same
    examples.

    >>> mixture_indices(["a", "a", "b", "b"], {"a": 1, "b": 0}, seed=0)
    [0, 1]

    Args:
        tasks: Task of each example.
        weights: Weight of each task.
        seed: Seed of the draw.

    Returns:
        Indices of the examples, sorted; an example that is used several times occurs several times.

    Raises:
        ValueError: A weighted task has no examples, or its share is less than one example.
    """
    rng = np.random.default_rng(seed)
    task_of = np.array(tasks)
    examples = {task: np.flatnonzero(task_of == task) for task, weight in weights.items() if weight > 0}
    if empty := [task for task, own in examples.items() if not len(own)]:
        raise ValueError(f"{', '.join(empty)} has a weight, but no training examples")
    total, weight_sum = sum(map(len, examples.values())), sum(weights[task] for task in examples)
    shares = [weights[task] / weight_sum * total for task in examples]
    ends = np.floor(np.cumsum(shares) + 0.5).astype(
        int
    )  # rounded cumulatively, so that counts add up to total
    mixture: list[int] = []
    for (task, own), count in zip(examples.items(), np.diff(ends, prepend=0), strict=True):
        if not count:
            raise ValueError(f"{task}: {weights[task]} of {weight_sum} is less than one of {total} examples")
        repeats, rest = divmod(int(count), len(own))
        mixture += np.tile(own, repeats).tolist() + rng.choice(own, rest, replace=False).tolist()
    return sorted(mixture)


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def weight_problems(weights: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Return every problem of ``weights`` for training sources with these names."""
    each = ", ".join(dict.fromkeys(names))
    if not isinstance(weights, Mapping):
        return [f"data.weights: {shown(weights)}; accepted: a number for each of {each}"]
    problems = []
    for name, weight in weights.items():
        if name not in names:
            problems.append(f"data.weights: {name!r} is not a training source; accepted: {each}")
        if not _is_number(weight) or weight < 0:
            problems.append(f"data.weights: {name}: {shown(weight)}; accepted: a number of at least 0")
    if missing := [name for name in dict.fromkeys(names) if name not in weights]:
        problems.append(
            f"data.weights: no weight for {', '.join(missing)}; accepted: a number for each of {each}"
        )
    if not problems and not _is_number(sum(map(float, weights.values()))):
        problems.append("data.weights: their sum is too large; accepted: smaller numbers of the same ratio")
    if not problems and not sum(weights.values()):
        problems.append(
            "data.weights: all are 0, which leaves no training examples; accepted: at least one above 0"
        )
    return problems
