"""Mixing sources by weight: how often each one's rows come in an epoch."""

from collections.abc import Mapping, Sequence

import numpy as np


def mixed_rows(tasks: Sequence[str], weights: Mapping[str, float], seed: int) -> list[int]:
    """The rows of an epoch in which tasks have the shares of ``weights``: numbers into ``tasks``, some perhaps several times.

    The epoch is as long as the tasks that have a weight are together. A task's rows are used whole times over, and the rest
    of its share is drawn from them at random, the same in every epoch. Raises ValueError for a task with a weight that has no
    row, or whose share is less than one row.

    >>> mixed_rows(["a", "a", "b", "b"], {"a": 1, "b": 0}, seed=0)
    [0, 1]
    """
    rng = np.random.default_rng(seed)
    task_of = np.array(tasks)
    rows = {task: np.flatnonzero(task_of == task) for task, weight in weights.items() if weight > 0}
    if empty := [task for task, own in rows.items() if not len(own)]:
        raise ValueError(f"no rows of {', '.join(empty)} are left to train on, but data.weights names it")
    total, whole = sum(map(len, rows.values())), sum(weights[task] for task in rows)
    ends = np.floor(np.cumsum([weights[task] / whole * total for task in rows]) + 0.5).astype(
        int
    )  # counts add up to total
    mixed: list[int] = []
    for (task, own), count in zip(rows.items(), np.diff(ends, prepend=0), strict=True):
        if not count:
            raise ValueError(f"{task}: {weights[task]} of {whole} is less than one of {total} rows")
        times, rest = divmod(int(count), len(own))
        mixed += np.tile(own, times).tolist() + rng.choice(own, rest, replace=False).tolist()
    return sorted(mixed)


def weight_problems(weights: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """What is wrong with ``weights`` of the sources called ``names``; empty when all is well."""
    found = []
    each = ", ".join(dict.fromkeys(names))
    for name, weight in weights.items():
        if name not in names:
            found.append(f"data.weights: {name!r} is no training source; accepted: {each}")
        if not 0 <= weight < float("inf"):
            found.append(f"data.weights: {name}: {weight}; accepted: a number of at least 0")
    if missing := [name for name in dict.fromkeys(names) if name not in weights]:
        found.append(f"data.weights: {', '.join(missing)} has none; accepted: a number for each of {each}")
    if not found and not sum(weights.values()):
        found.append(
            "data.weights: they sum to 0, which leaves no row to train on; accepted: at least one above 0"
        )
    return found
