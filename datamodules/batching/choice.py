"""Choose the examples of an epoch and of a held-out validation split, among all training examples."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from gatera_lightning.datamodules.batching.holdout import hold_out_validation
from gatera_lightning.datamodules.batching.mixture import mix_tasks


def choose_examples(
    table: Dataset, *, held_out: int | float | None, weights: Mapping[str, float] | None, seed: int
) -> dict[str, NDArray[np.integer[Any]]]:
    """Return which of all training examples a run trains on and is validated on.

    Args:
        table: Token table of all training examples.
        held_out: Number or share of examples to hold out for validation; None holds out none.
        weights: Share of each task in an epoch; None uses every example once.
        seed: Seed of both draws.

    Returns:
        For ``train``, and with ``held_out`` for ``validation``: the indices of its examples in order. An
        example that an epoch uses several times occurs several times.

    Raises:
        ConfigError: No example is left, or a weighted task has too few.
    """
    chosen: dict[str, NDArray[np.integer[Any]]] = {"train": np.arange(len(table))}
    if held_out is not None:
        train, validation = hold_out_validation(table["group"], held_out, seed)
        chosen = {"train": train, "validation": validation}
    if weights is not None:
        tasks = np.array(table["task"])[chosen["train"]]
        chosen["train"] = chosen["train"][mix_tasks(tasks.tolist(), weights, seed)]
    return chosen


def indices_digest(indices: NDArray[np.integer[Any]]) -> str:
    """Return the SHA-256, in hex digits, of indices: which example stands at which place."""
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
