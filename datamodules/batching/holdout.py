"""Rows held out of training: drawn at random, and never one without the others of its group."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def held_out_rows(groups: Sequence[str], rows: int, seed: int) -> NDArray[np.bool_]:
    """Which rows (len(groups),) are held out: whole groups in random order, until there are at least ``rows`` of them.

    ``groups`` names the group of each row; a row without a name is a group of its own.
    """
    names: list[str | int] = [name or row for row, name in enumerate(groups)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    group = np.array([numbers[name] for name in names])
    order = np.random.default_rng(seed).permutation(len(numbers))
    sizes = np.bincount(group)[order]
    return np.isin(
        group, order[np.cumsum(sizes) - sizes < rows]
    )  # a group comes in while those before it are too few
