"""The plan of optimizer steps, and the sharing of evaluation batches."""

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


def _plan(lengths, *, targets=None, batch_size=4, micro_batches=1, seed=0, **options):
    targets = [1] * len(lengths) if targets is None else targets
    return build_batch_schedule(
        lengths, targets, batch_size=batch_size, micro_batches=micro_batches, seed=seed, **options
    )


def _rows(step):
    return list(chain.from_iterable(step.micro_batches))


def _sizes(steps):
    return [len(_rows(step)) for step in steps]


def _padding(steps, lengths):
    """Padding tokens computed in one epoch."""
    micro_batches = [micro for step in steps for micro in step.micro_batches]
    return sum(
        len(micro) * max(lengths[r] for r in micro) - sum(lengths[r] for r in micro)
        for micro in micro_batches
    )


def _skewed(count):
    """Many short rows and a few long ones, as instruction data has them."""
    return np.random.default_rng(5).geometric(0.02, count).tolist()


# --- which rows form a step ---


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("budget", [None, 60])
def test_every_row_exactly_once(grouped, budget):
    steps = _plan(_skewed(203), batch_size=8, micro_batches=2, group_by_length=grouped, token_budget=budget)
    assert sorted(chain.from_iterable(_rows(step) for step in steps)) == list(range(203))


@pytest.mark.parametrize(
    ("rows", "batch_size", "micro_batches", "sizes"),
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
def test_steps_hold_batch_size_rows_and_a_last_step_too_small_is_merged(
    rows, batch_size, micro_batches, sizes
):
    assert _sizes(_plan([7] * rows, batch_size=batch_size, micro_batches=micro_batches)) == sizes


def test_micro_batches_of_a_step_differ_by_one_row_at_most():
    for step in _plan(_skewed(50), batch_size=7, micro_batches=3):
        sizes = [len(micro) for micro in step.micro_batches]
        assert len(sizes) == 3
        assert max(sizes) - min(sizes) <= 1


def test_totals_are_sums_over_the_whole_step():
    lengths, targets = list(range(100, 130)), list(range(30))
    for step in _plan(lengths, targets=targets, batch_size=8, micro_batches=4):
        assert step.tokens == sum(100 + row for row in _rows(step))
        assert step.supervised_tokens == sum(_rows(step))


def test_the_same_seed_gives_the_same_plan():
    lengths = _skewed(60)
    assert _plan(lengths, seed=3) == _plan(lengths, seed=3)
    assert _plan(lengths, seed=3) != _plan(lengths, seed=4)
    assert _plan(lengths, seed=3, group_by_length=False) != _plan(lengths, seed=4, group_by_length=False)


def test_rows_are_mixed_even_without_grouping():
    assert [_rows(step) for step in _plan([5] * 8, group_by_length=False)] != [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_grouping_by_length_lowers_padding():
    lengths = _skewed(512)
    grouped, mixed = (_plan(lengths, batch_size=8, group_by_length=grouped) for grouped in (True, False))
    assert _sizes(grouped) == _sizes(mixed) == [8] * 64
    assert _padding(grouped, lengths) < 0.3 * _padding(mixed, lengths)


def test_grouping_leaves_steps_mixed():
    """Sorting everything would make one step of the longest rows of all; windows make several."""
    lengths = _skewed(512)
    steps = _plan(lengths, batch_size=8)
    longest = set(sorted(range(512), key=lambda row: lengths[row])[-8:])
    assert len([step for step in steps if longest & set(_rows(step))]) > 1


def test_micro_batches_of_mixed_steps_hold_similar_lengths():
    """Even without grouping, the rows inside a step are dealt out by length."""
    for step in _plan(_skewed(64), batch_size=8, micro_batches=2, group_by_length=False):
        lengths = _skewed(64)
        shorter, longer = step.micro_batches
        assert max(lengths[row] for row in shorter) <= min(lengths[row] for row in longer)


# --- token budget ---


@pytest.mark.parametrize(
    ("budget", "micro_batches", "sizes"),
    [
        (None, 1, [8, 4]),
        (1000, 1, [8, 4]),
        (35, 1, [3, 3, 3, 3]),
        (30, 1, [3, 3, 3, 3]),
        (29, 1, [2, 2, 2, 2, 2, 2]),
        (5, 1, [1] * 12),  # a row longer than the budget is a step of its own
        (5, 4, [4, 4, 4]),  # every micro-batch needs a row
        (35, 2, [3, 3, 3, 3]),
    ],
)
def test_token_budget_with_rows_of_ten_tokens(budget, micro_batches, sizes):
    assert _sizes(_plan([10] * 12, batch_size=8, token_budget=budget, micro_batches=micro_batches)) == sizes


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_token_budget_is_kept_unless_micro_batches_force_more(grouped, micro_batches):
    *steps, last = _plan(
        _skewed(300), batch_size=8, micro_batches=micro_batches, token_budget=250, group_by_length=grouped
    )
    assert all(step.tokens <= 250 or len(_rows(step)) == micro_batches for step in steps)
    assert max(_sizes(steps)) <= 8
    assert len(_rows(last)) >= micro_batches


def test_budgeted_steps_are_filled():
    """A step closes only because its rows are many or the next row would not fit."""
    steps = _plan([10, 20, 30] * 20, batch_size=8, token_budget=100, group_by_length=False)
    assert all(step.tokens > 70 or len(_rows(step)) == 8 for step in steps[:-1])


# --- what cannot be planned ---


@pytest.mark.parametrize(("rows", "micro_batches"), [(3, 4), (0, 1), (1, 2)])
def test_too_few_rows(rows, micro_batches):
    with pytest.raises(ValueError, match=f"{rows} rows cannot fill {micro_batches} micro-batches"):
        _plan([5] * rows, micro_batches=micro_batches)


# --- properties ---


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
def test_any_plan(lengths, accumulate, ranks, extra, budget, grouped, seed):
    micro_batches = accumulate * ranks
    batch_size = micro_batches + extra
    lengths += [3] * max(0, micro_batches - len(lengths))
    targets = [length - 1 for length in lengths]
    options = {
        "batch_size": batch_size,
        "micro_batches": micro_batches,
        "token_budget": budget,
        "group_by_length": grouped,
    }
    steps = build_batch_schedule(lengths, targets, seed=seed, **options)

    assert sorted(chain.from_iterable(_rows(step) for step in steps)) == list(range(len(lengths)))
    assert all(len(step.micro_batches) == micro_batches and all(step.micro_batches) for step in steps)
    assert all(size <= batch_size for size in _sizes(steps)[:-1])
    assert _sizes(steps)[-1] < batch_size + micro_batches
    assert [step.tokens for step in steps] == [sum(lengths[row] for row in _rows(step)) for step in steps]
    assert [step.supervised_tokens for step in steps] == [sum(targets[row] for row in _rows(step)) for step in steps]
    if budget is None:
        assert set(_sizes(steps)[:-1]) <= {batch_size}


# --- evaluation batches ---

LENGTHS = [5, 1, 7, 3, 9, 2, 8]  # longest first: 4 6 2 0 3 5 1


@pytest.mark.parametrize(
    ("done", "first", "second"),
    [
        (set(), [[4, 6, 2], [1]], [[0, 3, 5], []]),
        ({6}, [[4, 2], [1]], [[0, 3, 5], []]),  # nothing moves up into the place of what is done
        ({6, 0, 3, 5}, [[4, 2]], [[1]]),
        ({4, 6, 2}, [[0, 3, 5]], [[1]]),
        ({1, 3}, [[4, 6, 2]], [[0, 5]]),
        ({4, 6, 2, 0, 3, 5}, [[1]], [[]]),
        (set(range(7)), [[]], [[]]),
    ],
)
def test_batches_of_seven_items_on_two_ranks_by_hand(done, first, second):
    assert shard_evaluation_batches(LENGTHS, 3, 2, 0, done) == first
    assert shard_evaluation_batches(LENGTHS, 3, 2, 1, done) == second


def test_batches_for_one_rank_by_hand():
    assert shard_evaluation_batches(LENGTHS, 3, 1, 0) == [[4, 6, 2], [0, 3, 5], [1]]
    assert shard_evaluation_batches(LENGTHS, 3, 1, 0, done={4, 6, 2, 1}) == [[0, 3, 5]]
    assert shard_evaluation_batches(LENGTHS, 99, 1, 0) == [[4, 6, 2, 0, 3, 5, 1]]


def test_items_of_one_length_keep_their_order():
    assert shard_evaluation_batches([5, 5, 9, 5, 5], 2, 1, 0) == [[2, 0], [1, 3], [4]]


@pytest.mark.parametrize("lengths", [[], [3, 4, 5]])
def test_every_rank_has_a_batch_even_when_nothing_is_left(lengths):
    """A loader without batches runs no forward, and the other processes of a sharded model wait for it."""
    assert [shard_evaluation_batches(lengths, 4, 3, rank, done={0, 1, 2}) for rank in range(3)] == [[[]], [[]], [[]]]


@PROPERTY
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    batch_size=st.integers(1, 6),
    ranks=st.integers(1, 5),
    done=st.sets(st.integers(0, 40)),
)
def test_what_is_computed_together_depends_neither_on_ranks_nor_on_what_is_done(
    lengths, batch_size, ranks, done
):
    shares = [shard_evaluation_batches(lengths, batch_size, ranks, rank, done) for rank in range(ranks)]
    given = Counter(chain.from_iterable(chain.from_iterable(shares)))
    assert given == Counter(set(range(len(lengths))) - done)
    assert len({len(share) for share in shares}) == 1
    assert shares[0]

    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    cut = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    kept = [rest for rest in ([item for item in batch if item not in done] for batch in cut) if rest]
    dealt = [batch for together in zip(*shares, strict=True) for batch in together]
    assert dealt[: len(kept)] == kept  # each rank in turn, longest first
    assert not any(dealt[len(kept) :])
    assert len(dealt) - len(kept) < ranks or not kept
