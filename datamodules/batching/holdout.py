"""Draw a validation split from the training examples at random, without dividing groups."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gatera_lightning.datamodules.settings import shown
from gatera_lightning.errors import ConfigError


def held_out_problems(size: int | float | None) -> list[str]:
    """Return the problem of a setting that says how many training examples to hold out, or an empty list."""
    if size is None:
        return []
    if isinstance(size, int | float) and not isinstance(size, bool):
        valid = size >= 1 if isinstance(size, int) else 0 < size < 1
        if valid:
            return []
    return [
        f"data.validation: {shown(size)}; accepted: sources, or how many training examples to hold out: an "
        "integer of at least 1, or a share between 0 and 1"
    ]


def hold_out_validation(
    groups: Sequence[str], size: int | float, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Divide the training examples.

    Args:
        groups: Name of each example's group; an example with an empty name is a group of its own.
        size: Number of validation examples, or their share; rounded up to whole groups.
        seed: Seed of the draw.

    Returns:
        The indices of the examples of the training and the validation split.

    Raises:
        ConfigError: No training example would be left.
    """
    total = len(groups)
    count = size if isinstance(size, int) else max(1, round(size * total))
    if count >= total:
        raise ConfigError(f"data.validation: {size} of {total} training examples leaves none to train on")
    held_out = validation_mask(groups, count, seed)
    if held_out.all():
        raise ConfigError(
            f"data.validation: {size} of {total} training examples leaves none to train on, because "
            "examples of the same group stay together"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def validation_mask(groups: Sequence[str], count: int, seed: int) -> NDArray[np.bool_]:
    """Choose groups in random order until they have at least ``count`` examples.

    Args:
        groups: Name of each example's group; an example with an empty name is a group of its own.
        count: Minimum number of examples.
        seed: Seed of the order.

    Returns:
        (examples,), True for the chosen examples.
    """
    names: list[str | int] = [name or index for index, name in enumerate(groups)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    group = np.array([numbers[name] for name in names])  # (examples,)
    order = np.random.default_rng(seed).permutation(len(numbers))  # (groups,)
    sizes = np.bincount(group)[order]
    sizes_before = np.cumsum(sizes) - sizes
    return np.isin(group, order[sizes_before < count])
