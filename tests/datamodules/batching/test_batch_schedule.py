"""The batch schedule: optimizer steps, and evaluation batches of each rank."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatera_lightning.datamodules.batching.batch_schedule import (
    build_batch_schedule,
    shard_evaluation_batches,
)

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def _schedule(lengths, *, batch_size=4, micro_batches=1, seed=0, **options):
    return build_batch_schedule(
        lengths, [1] * len(lengths), batch_size=batch_size, micro_batches=micro_batches, seed=seed, **options
    )


def _examples(step):
    return list(chain.from_iterable(step.micro_batches))


def _sizes(steps):
    return [len(_examples(step)) for step in steps]


def _padding(steps, lengths):
    """Padding tokens of one epoch."""
    micro_batches = [micro for step in steps for micro in step.micro_batches]
    return sum(
        len(micro) * max(lengths[i] for i in micro) - sum(lengths[i] for i in micro)
        for micro in micro_batches
    )


def _skewed_lengths(count):
    """Many short examples and a few long ones, as in instruction data."""
    return np.random.default_rng(5).geometric(0.02, count).tolist()


# --- steps ---


@pytest.mark.parametrize(
    ("count", "batch_size", "micro_batches", "sizes"),
    [
        (20, 4, 1, [4, 4, 4, 4, 4]),
        (21, 4, 1, [4, 4, 4, 4, 4, 1]),
        (21, 4, 2, [4, 4, 4, 4, 5]),
        (22, 4, 2, [4, 4, 4, 4, 4, 2]),
        (11, 4, 4, [4, 7]),
        (3, 4, 2, [3]),
        (2, 4, 2, [2]),
        (5, 100, 3, [5]),
    ],
)
def test_schedule_merges_short_last_step(count, batch_size, micro_batches, sizes):
    assert _sizes(_schedule([7] * count, batch_size=batch_size, micro_batches=micro_batches)) == sizes


def test_micro_batches_differ_by_at_most_one_example():
    for step in _schedule(_skewed_lengths(50), batch_size=7, micro_batches=3):
        sizes = [len(micro) for micro in step.micro_batches]
        assert len(sizes) == 3
        assert max(sizes) - min(sizes) <= 1


def test_schedule_depends_on_seed():
    lengths = _skewed_lengths(60)
    assert _schedule(lengths, seed=3) == _schedule(lengths, seed=3)
    assert _schedule(lengths, seed=3) != _schedule(lengths, seed=4)
    assert _schedule(lengths, seed=3, group_by_length=False) != _schedule(
        lengths, seed=4, group_by_length=False
    )


def test_schedule_shuffles_without_grouping():
    assert [_examples(step) for step in _schedule([5] * 8, group_by_length=False)] != [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


def test_grouping_reduces_padding():
    lengths = _skewed_lengths(512)
    grouped, mixed = (_schedule(lengths, batch_size=8, group_by_length=grouped) for grouped in (True, False))
    assert _sizes(grouped) == _sizes(mixed) == [8] * 64
    assert _padding(grouped, lengths) < 0.3 * _padding(mixed, lengths)


def test_grouping_sorts_only_within_windows():
    """Sorting all examples would put the longest ones into one step."""
    lengths = _skewed_lengths(512)
    steps = _schedule(lengths, batch_size=8)
    longest = set(sorted(range(512), key=lengths.__getitem__)[-8:])
    assert len([step for step in steps if longest & set(_examples(step))]) > 1


def test_micro_batches_are_sorted_by_length():
    """Even without grouping by length."""
    lengths = _skewed_lengths(64)
    for step in _schedule(lengths, batch_size=8, micro_batches=2, group_by_length=False):
        shorter, longer = step.micro_batches
        assert max(lengths[i] for i in shorter) <= min(lengths[i] for i in longer)


# --- token budget ---


@pytest.mark.parametrize(
    ("budget", "micro_batches", "sizes"),
    [
        (None, 1, [8, 4]),
        (1000, 1, [8, 4]),
        (35, 1, [3, 3, 3, 3]),
        (30, 1, [3, 3, 3, 3]),
        (29, 1, [2, 2, 2, 2, 2, 2]),
        (5, 1, [1] * 12),  # an example above the budget is a step of its own
        (5, 4, [4, 4, 4]),  # every micro-batch needs an example
        (35, 2, [3, 3, 3, 3]),
    ],
)
def test_token_budget_limits_step_size(budget, micro_batches, sizes):
    assert (
        _sizes(_schedule([10] * 12, batch_size=8, token_budget=budget, micro_batches=micro_batches)) == sizes
    )


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_token_budget_yields_to_micro_batches(grouped, micro_batches):
    *steps, last = _schedule(
        _skewed_lengths(300),
        batch_size=8,
        micro_batches=micro_batches,
        token_budget=250,
        group_by_length=grouped,
    )
    assert all(step.tokens <= 250 or len(_examples(step)) == micro_batches for step in steps)
    assert max(_sizes(steps)) <= 8
    assert len(_examples(last)) >= micro_batches


def test_token_budget_fills_steps():
    """A step closes only if it has enough examples or the next one would exceed the budget."""
    steps = _schedule([10, 20, 30] * 20, batch_size=8, token_budget=100, group_by_length=False)
    assert all(step.tokens > 70 or len(_examples(step)) == 8 for step in steps[:-1])


@pytest.mark.parametrize(("count", "micro_batches"), [(3, 4), (0, 1), (1, 2)])
def test_schedule_rejects_too_few_examples(count, micro_batches):
    with pytest.raises(ValueError, match=f"{count} examples cannot fill {micro_batches} micro-batches"):
        _schedule([5] * count, micro_batches=micro_batches)


@PROPERTY
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=70),
    accumulate=st.integers(1, 4),
    ranks=st.integers(1, 4),
    extra=st.integers(0, 9),
    budget=st.none() | st.integers(1, 200),
    grouped=st.booleans(),
    seed=st.integers(0, 3),
)
def test_schedule_properties(lengths, accumulate, ranks, extra, budget, grouped, seed):
    micro_batches = accumulate * ranks
    batch_size = micro_batches + extra
    lengths += [3] * max(0, micro_batches - len(lengths))
    supervised = [length - 1 for length in lengths]
    options = {
        "batch_size": batch_size,
        "micro_batches": micro_batches,
        "token_budget": budget,
        "group_by_length": grouped,
    }
    steps = build_batch_schedule(lengths, supervised, seed=seed, **options)

    assert sorted(chain.from_iterable(_examples(step) for step in steps)) == list(range(len(lengths)))
    assert all(len(step.micro_batches) == micro_batches and all(step.micro_batches) for step in steps)
    assert all(size <= batch_size for size in _sizes(steps)[:-1])
    assert _sizes(steps)[-1] < batch_size + micro_batches
    for step in steps:
        assert step.tokens == sum(lengths[i] for i in _examples(step))
        assert step.supervised_tokens == sum(supervised[i] for i in _examples(step))
    if budget is None:
        assert set(_sizes(steps)[:-1]) <= {batch_size}


# --- evaluation batches ---

LENGTHS = [5, 1, 7, 3, 9, 2, 8]  # longest first: 4 6 2 0 3 5 1


@pytest.mark.parametrize(
    ("done", "first", "second"),
    [
        (set(), [[4, 6, 2], [1]], [[0, 3, 5], []]),
        ({6}, [[4, 2], [1]], [[0, 3, 5], []]),  # batches are not refilled
        ({6, 0, 3, 5}, [[4, 2]], [[1]]),
        ({4, 6, 2}, [[0, 3, 5]], [[1]]),
        ({1, 3}, [[4, 6, 2]], [[0, 5]]),
        ({4, 6, 2, 0, 3, 5}, [[1]], [[]]),
        (set(range(7)), [[]], [[]]),
    ],
)
def test_shard_distributes_batches_over_ranks(done, first, second):
    assert shard_evaluation_batches(LENGTHS, 3, 2, 0, done) == first
    assert shard_evaluation_batches(LENGTHS, 3, 2, 1, done) == second


def test_shard_forms_batches_longest_first():
    assert shard_evaluation_batches(LENGTHS, 3, 1, 0) == [[4, 6, 2], [0, 3, 5], [1]]
    assert shard_evaluation_batches(LENGTHS, 3, 1, 0, done={4, 6, 2, 1}) == [[0, 3, 5]]
    assert shard_evaluation_batches(LENGTHS, 99, 1, 0) == [[4, 6, 2, 0, 3, 5, 1]]


def test_shard_keeps_order_of_equal_lengths():
    assert shard_evaluation_batches([5, 5, 9, 5, 5], 2, 1, 0) == [[2, 0], [1, 3], [4]]


@pytest.mark.parametrize("lengths", [[], [3, 4, 5]])
def test_shard_gives_every_rank_a_batch(lengths):
    """Ranks of a sharded model hang if one of them runs no forward pass."""
    assert [shard_evaluation_batches(lengths, 4, 3, rank, done={0, 1, 2}) for rank in range(3)] == [
        [[]],
        [[]],
        [[]],
    ]


@PROPERTY
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    batch_size=st.integers(1, 6),
    ranks=st.integers(1, 5),
    done=st.sets(st.integers(0, 40)),
)
def test_shard_properties(lengths, batch_size, ranks, done):
    shares = [shard_evaluation_batches(lengths, batch_size, ranks, rank, done) for rank in range(ranks)]
    """Which examples are computed together depends neither on the ranks nor on what is done."""
    sharded = Counter(chain.from_iterable(chain.from_iterable(shares)))
    assert sharded == Counter(set(range(len(lengths))) - done)
    assert len({len(share) for share in shares}) == 1
    assert shares[0]

    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    expected = [rest for batch in batches if (rest := [item for item in batch if item not in done])]
    found = [batch for together in zip(*shares, strict=True) for batch in together]
    assert found[: len(expected)] == expected
    assert not any(found[len(expected) :])
    assert len(found) - len(expected) < ranks or not expected
