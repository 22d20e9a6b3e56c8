"""Optimizer steps planned before training: which rows form a step, and how its micro-batches are shared out.

Batches are formed once, from cached lengths, so the number of batches is the same in every epoch and on every rank,
each step's totals are known before its first forward, and resuming needs only a position in a shuffled list of steps.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

_WINDOW = 16
"""Rows are sorted by length within windows of this many steps: little padding, and steps stay mixed."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: its micro-batches (rows of each, in order) and its totals over all of them."""

    micro_batches: tuple[tuple[int, ...], ...]
    targets: int
    tokens: int


def plan_steps(
    lengths: Sequence[int],
    targets: Sequence[int],
    *,
    batch_size: int,
    micro_batches: int,
    seed: int,
    token_budget: int | None = None,
    group_by_length: bool = True,
) -> list[Step]:
    """Cut rows into optimizer steps of ``batch_size`` rows (fewer where ``token_budget`` real tokens are reached).

    ``lengths`` and ``targets`` are real and target tokens per row; ``micro_batches`` = accumulation × ranks. Every row
    is used exactly once. A last step with fewer rows than micro-batches joins the one before it, so that no
    micro-batch is empty. Raises ValueError when there are fewer rows than micro-batches.
    """
    if len(lengths) < micro_batches:
        raise ValueError(
            f"{len(lengths)} rows cannot fill {micro_batches} micro-batches (accumulation × processes)"
        )
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    if group_by_length:
        span = _WINDOW * batch_size
        windows = [
            sorted(order[i : i + span], key=lambda row: lengths[row]) for i in range(0, len(order), span)
        ]
        order = [row for window in windows for row in window]

    groups: list[list[int]] = [[]]
    for row in order:
        full = len(groups[-1]) >= batch_size
        spent = token_budget is not None and sum(lengths[r] for r in groups[-1]) + lengths[row] > token_budget
        if full or (spent and len(groups[-1]) >= micro_batches):
            groups.append([])
        groups[-1].append(row)
    if len(groups) > 1 and len(groups[-1]) < micro_batches:
        last = groups.pop()
        groups[-1] += last

    steps = []
    for rows in groups:
        rows = sorted(rows, key=lambda row: lengths[row])
        cuts = np.array_split(np.array(rows), micro_batches)
        steps.append(
            Step(
                tuple(tuple(cut.tolist()) for cut in cuts),
                sum(targets[row] for row in rows),
                sum(lengths[row] for row in rows),
            )
        )
    return steps


def share_batches(
    lengths: Sequence[int], batch_size: int, ranks: int, rank: int, done: Container[int] = frozenset()
) -> list[list[int]]:
    """Evaluation batches of one rank: every item not yet ``done`` on exactly one rank, and as many batches on every rank.

    Batches are cut before they are shared out, and one that is partly done is not filled up again: what is computed
    together, and so every rounding, depends neither on the number of ranks nor on where an earlier run was killed.
    Longest first, so that running out of memory happens at once. A rank without a batch left gets an empty one, which
    the collator fills with a row that counts for nothing: sharded models hang when ranks run unequal forwards.
    """
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    cut = (order[i : i + batch_size] for i in range(0, len(order), batch_size))
    left = [rest for batch in cut if (rest := [item for item in batch if item not in done])]
    left += [[]] * (-len(left) % ranks if left else ranks)
    return left[rank::ranks]
