"""The batch schedule: which examples form each optimizer step and each evaluation batch.

Batches are formed once, from cached lengths. So every epoch and every rank has the same number of batches,
the totals of a step are known before its first forward pass, and resuming takes only a position in a shuffled
list of steps.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from gatera_lightning.errors import ConfigError

_WINDOW = 16
"""Examples are sorted by length within windows of this many steps: little padding, but mixed steps."""


@dataclass(frozen=True)
class OptimizerStep:
    """The micro-batches of one optimizer step, and totals over all of them."""

    micro_batches: tuple[tuple[int, ...], ...]
    """Indices of the examples of each micro-batch; number ``k * ranks + r`` is the ``k``-th of rank ``r``."""

    supervised_tokens: int
    """Supervised tokens of the step."""

    tokens: int
    """Non-padding tokens of the step."""


def build_batch_schedule(
    lengths: Sequence[int],
    supervised_tokens: Sequence[int],
    *,
    batch_size: int,
    micro_batches: int,
    seed: int,
    token_budget: int | None = None,
    group_by_length: bool = True,
) -> list[OptimizerStep]:
    """Divide the examples into optimizer steps; every example is used exactly once.

    A last step with fewer examples than micro-batches is merged into the one before it, so that no
    micro-batch is empty.

    Args:
        lengths: Tokens of each example.
        supervised_tokens: Supervised tokens of each example.
        batch_size: Examples per step.
        micro_batches: Micro-batches per step: accumulate_grad_batches × ranks.
        seed: Seed of the shuffle before grouping.
        token_budget: Close a step before it exceeds this many tokens; None for no limit.
        group_by_length: Form steps of examples of similar length.

    Raises:
        ValueError: There are fewer examples than micro-batches.
    """
    if len(lengths) < micro_batches:
        raise ValueError(
            f"{len(lengths)} examples cannot fill {micro_batches} micro-batches "
            "(accumulate_grad_batches × ranks)"
        )
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    if group_by_length:
        span = _WINDOW * batch_size
        windows = [sorted(order[i : i + span], key=lengths.__getitem__) for i in range(0, len(order), span)]
        order = [example for window in windows for example in window]

    groups: list[list[int]] = [[]]
    for example in order:
        group = groups[-1]
        full = len(group) >= batch_size
        over_budget = (
            token_budget is not None and sum(lengths[i] for i in group) + lengths[example] > token_budget
        )
        if full or (over_budget and len(group) >= micro_batches):
            groups.append([])
        groups[-1].append(example)
    if len(groups) > 1 and len(groups[-1]) < micro_batches:
        last = groups.pop()
        groups[-1] += last

    steps = []
    for group in groups:
        group = sorted(group, key=lengths.__getitem__)
        parts = np.array_split(np.array(group), micro_batches)
        steps.append(
            OptimizerStep(
                tuple(tuple(part.tolist()) for part in parts),
                sum(supervised_tokens[i] for i in group),
                sum(lengths[i] for i in group),
            )
        )
    return steps


def batch_size_problems(batch_size: int, accumulate: int, ranks: int) -> list[str]:
    """Return the problem of a batch size that leaves micro-batches empty, or an empty list."""
    if batch_size >= accumulate * ranks:
        return []
    return [
        f"data.batch_size: {batch_size} examples per step cannot fill accumulate_grad_batches "
        f"{accumulate} × {ranks} ranks; accepted: at least {accumulate * ranks}"
    ]


def micro_batches_per_epoch(available: int, limit: int | float, accumulate: int) -> int:
    """Return how many micro-batches of a rank make an epoch under ``trainer.limit_train_batches``.

    Args:
        available: Micro-batches of the schedule on each rank.
        limit: ``trainer.limit_train_batches``, a number or a share.
        accumulate: Micro-batches per optimizer step on each rank.

    Raises:
        ConfigError: The epoch would have no micro-batch, or end within an optimizer step.
    """
    count = min(available, limit if isinstance(limit, int) else int(limit * available))  # as Lightning does
    if available and not count:
        raise ConfigError(empty_share("limit_train_batches", limit, available), on_every_rank=True)
    if count % accumulate:
        raise ConfigError(
            f"trainer.limit_train_batches: {limit} (also set by fast_dev_run and overfit_batches) ends an "
            f"epoch after {count} micro-batches, in the middle of an optimizer step; accepted: a multiple of "
            f"accumulate_grad_batches, {accumulate}"
        )
    return count


def empty_share(name: str, limit: int | float, available: int) -> str:
    """Return the problem of a limit of the Trainer that leaves none of the batches that there are.

    Args:
        name: The setting: ``limit_train_batches``, ``limit_val_batches``, …
        limit: Its value.
        available: Batches without a limit.
    """
    least = math.ceil(10_000 / available) / 10_000  # so that rounding down leaves one
    return (
        f"trainer.{name}: {limit} of {available} batches is none; accepted: an integer of at least 1, or a "
        f"share of at least {least}"
    )


def shard_evaluation_batches(
    lengths: Sequence[int], batch_size: int, ranks: int, rank: int, done: Container[int] = frozenset()
) -> list[list[int]]:
    """Return the evaluation batches of one rank.

    The longest examples come first, so that running out of memory shows at once. Each example that is not
    done is on exactly one rank, and every rank gets the same number of batches. Batches are formed before
    they are distributed, and one that is partly done is not refilled: which examples are computed together,
    and therefore all rounding, depends neither on the number of ranks nor on where an earlier run stopped.

    A rank that runs out of batches gets empty ones, which become dummy examples: sharded models hang when
    ranks run different numbers of forward passes.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples per batch.
        ranks: Number of ranks.
        rank: The rank whose batches are returned.
        done: Examples that were evaluated before.

    Returns:
        Indices of the examples of each batch.
    """
    order = sorted(range(len(lengths)), key=lambda example: -lengths[example])
    batches = (order[i : i + batch_size] for i in range(0, len(order), batch_size))
    open_batches = [
        rest for batch in batches if (rest := [example for example in batch if example not in done])
    ]
    open_batches += [[]] * (-len(open_batches) % ranks if open_batches else ranks)
    return open_batches[rank::ranks]
