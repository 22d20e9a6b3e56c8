"""Packing: which sequences share a row, and that packed batches hold the same sequences as unpacked ones."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate
from gatera_lightning.datamodules.batching.datasets import TokenTable
from gatera_lightning.datamodules.batching.packing import pack_sequences
from gatera_lightning.datamodules.batching.statistics import gold_lengths, padding_share, scheduled_lengths

# --- choice of packed sequences ---


def _area(packs, lengths):
    return len(packs) * max(sum(lengths[i] for i in pack) for pack in packs)


def _partitions(items):
    """Yield every partition of a list."""
    if not items:
        yield []
        return
    first, *others = items
    for packs in _partitions(others):
        yield [[first], *packs]
        yield from ([*packs[:i], [first, *packs[i]], *packs[i + 1 :]] for i in range(len(packs)))


def _smallest_area(lengths, capacity):
    """The smallest area of all partitions, by exhaustive search."""
    capacity = max(capacity, *lengths)
    return min(
        _area(packs, lengths)
        for packs in _partitions(list(range(len(lengths))))
        if all(sum(lengths[i] for i in pack) <= capacity for pack in packs)
    )


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        ([5], 9, [[0]]),
        ([5], 1, [[0]]),  # the longest sequence raises the capacity
        ([3, 5], 9, [[0, 1]]),
        ([3, 5], 7, [[0], [1]]),
        ([5, 2, 3], 6, [[0], [1, 2]]),
        ([5, 2, 3], 3, [[0], [1, 2]]),
        ([4, 4, 4], 8, [[0], [1], [2]]),  # two rows of 8 are larger than three of 4
        ([4, 4, 4, 4], 8, [[0], [1], [2], [3]]),  # the same area with shorter rows
        ([7, 1, 6, 2, 3], 9, [[0], [1, 3, 4], [2]]),
        ([6, 1, 1, 1, 3], 6, [[0], [1, 2, 3, 4]]),
    ],
)
def test_pack_sequences_by_hand(lengths, capacity, expected):
    assert sorted(map(sorted, pack_sequences(lengths, capacity))) == expected


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(lengths=SIZES, capacity=st.integers(1, 200))
def test_pack_sequences_properties(lengths, capacity):
    packs = pack_sequences(lengths, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(packs)
    assert max(sum(lengths[i] for i in pack) for pack in packs) <= max(capacity, *lengths)
    assert sum(lengths) <= _area(packs, lengths) <= len(lengths) * max(lengths)
    if sum(lengths) <= capacity:
        assert len(packs) == 1 or _area(packs, lengths) == sum(lengths)
    assert packs == pack_sequences(lengths, capacity)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), capacity=st.integers(1, 40))
def test_pack_sequences_is_near_optimum(lengths, capacity):
    smallest = _smallest_area(lengths, capacity)
    assert smallest <= _area(pack_sequences(lengths, capacity), lengths) <= 4 / 3 * smallest


def test_pack_sequences_is_mostly_optimal():
    draw = random.Random(0)
    cases = [
        ([draw.randint(1, 12) for _ in range(draw.randint(1, 6))], draw.randint(1, 40)) for _ in range(150)
    ]
    best = [_area(pack_sequences(*case), case[0]) == _smallest_area(*case) for case in cases]
    assert sum(best) > 0.9 * len(best)


@pytest.mark.parametrize("capacity", [24, 60])
def test_pack_sequences_leaves_equal_lengths_unpacked(capacity):
    assert pack_sequences([12] * 7, capacity) == [[i] for i in range(7)]


# --- packed batches by hand ---


def test_collate_packed_sequences_by_hand():
    sequences = [
        TokenSequence([3, 4, 5], [6, 0], earlier_responses=[(1, 2)], example_id=7, characters=9),
        TokenSequence([8], [0], example_id=4),
        TokenSequence([9, 9], [0], example_id=2, answer=1, gold=1),
    ]
    batch = collate(sequences, pad_id=77, train_on="every_response", packs=[[2, 1], [0]])
    x = IGNORE_INDEX
    assert batch["input_ids"].tolist() == [[9, 9, 0, 8, 0], [3, 4, 5, 6, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5] * 2
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[x, x, 0, x, 0], [x, 4, x, 6, 0]]
    assert batch["response_mask"].int().tolist() == [[0, 0, 1, 0, 1], [0, 0, 0, 1, 1]]
    assert batch["example_ids"].tolist() == [7, 4, 2]
    assert batch["answer_ids"].tolist() == batch["gold_ids"].tolist() == [0, 0, 1]
    assert batch["answer_characters"].tolist() == [9, 1, 1]
    assert (batch["step_supervised_tokens"], batch["step_tokens"]) == (5, 10)

    batch = collate(sequences, pad_id=77, train_on="response", packs=[[0, 2], [1]])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 0, 9, 9, 0], [8, 0, *[77] * 6]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1, 1, *[0] * 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[x, x, x, 6, 0, x, x, 0], [x, 0, *[x] * 6]]
    assert batch["response_mask"][1].tolist() == [False, True, *[False] * 6]


def test_first_token_of_packed_sequence_is_not_supervised():
    """The loss shifts labels by one, so a label there would be predicted from the previous sequence."""
    sequences = [TokenSequence([], [5, 0], example_id=0), TokenSequence([6], [7, 0], example_id=1)]
    for train_on in ("response", "all"):
        batch = collate(sequences, pad_id=0, train_on=train_on, packs=[[0, 1]])
        assert batch["labels"][0, [0, 2]].tolist() == [IGNORE_INDEX] * 2


def test_unpacked_batch_has_no_position_ids():
    assert "position_ids" not in collate([TokenSequence([5], [6], example_id=0)], pad_id=0, train_on="all")


# --- packed and unpacked batches ---


def _sequences(batch):
    """Tokens, labels and response mask of each sequence; sequences start at position 0."""
    names, found = ("input_ids", "labels", "response_mask"), []
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        assert not batch["attention_mask"][row, length:].any()
        positions = batch["position_ids"][row] if "position_ids" in batch else torch.arange(length)
        starts = [i for i in range(length) if positions[i] == 0]
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append(tuple(tuple(batch[name][row, start:end].tolist()) for name in names))
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert not batch["response_mask"][row, length:].any()
    return sorted(found)


@pytest.fixture
def chats(write):
    """A file of 23 chats with one to four turns, and 8 instructions."""
    rows = []
    for number in range(23):
        turns = [
            {"role": role, "content": f"{role} {number} {'so ' * (number * turn % 7)}{turn}"}
            for turn in range(1 + number % 4)
            for role in ("user", "assistant")
        ]
        rows.append({"messages": turns})
    rows += [{"instruction": f"Count to {number}.", "output": "one " * number + "end"} for number in range(8)]
    return write("chats.json", rows)


@pytest.mark.parametrize("train_on", ["response", "every_response", "all"])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_packed_epoch_has_same_sequences_per_micro_batch(
    ranks, accumulate, train_on, chats, make_instruction_data
):
    settings = {
        "train": [chats],
        "validation": [chats],
        "train_on": train_on,
        "batch_size": 9,
        "group_by_length": False,
    }
    padding = {True: 0, False: 0}
    for rank in range(ranks):
        plain, packed = (
            make_instruction_data(
                ranks=ranks, rank=rank, accumulate=accumulate, packing=packing, stage="fit", **settings
            )
            for packing in (False, True)
        )
        one, other = plain.train_dataloader(), packed.train_dataloader()
        assert one.dataset.steps == other.dataset.steps
        assert one.state_dict() == other.state_dict()
        for unpacked, batch in zip(one, other, strict=True):
            assert _sequences(batch) == _sequences(unpacked)
            for name in ("example_ids", "answer_ids", "gold_ids", "answer_characters"):
                assert batch[name].tolist() == unpacked[name].tolist()
            assert (batch["step_supervised_tokens"], batch["step_tokens"]) == (
                unpacked["step_supervised_tokens"],
                unpacked["step_tokens"],
            )
            assert batch["attention_mask"].numel() <= unpacked["attention_mask"].numel()
            assert batch["input_ids"].shape[1] <= 512
            for packing, found in ((True, batch), (False, unpacked)):
                padding[packing] += int((found["attention_mask"] == 0).sum())
    assert padding[True] < padding[False] / 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_totals_match_packed_batches(accumulate, chats, make_instruction_data):
    data = make_instruction_data(
        train=[chats],
        validation=1,
        train_on="every_response",
        packing=True,
        accumulate=accumulate,
        stage="fit",
    )
    batches = list(data.train_dataloader())
    for start in range(0, len(batches), accumulate):
        step = batches[start : start + accumulate]
        supervised, tokens = (
            sum(int(found.sum()) for found in each)
            for each in zip(
                *((batch["labels"] != IGNORE_INDEX, batch["attention_mask"]) for batch in step), strict=True
            )
        )
        assert {(batch["step_supervised_tokens"], batch["step_tokens"]) for batch in step} == {
            (supervised, tokens)
        }


@pytest.mark.parametrize("max_length", [90, 160, 512])
def test_packed_sequences_respect_max_length(max_length, chats, make_instruction_data):
    settings = {
        "train": [chats],
        "validation": 1,
        "max_length": max_length,
        "batch_size": 10,
        "group_by_length": False,
    }
    widths = [
        batch["input_ids"].shape[1]
        for batch in make_instruction_data(packing=True, stage="fit", **settings).train_dataloader()
    ]
    assert max(widths) <= max_length
    assert max(widths) > max_length // 2


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_padding_share_matches_packed_batches(grouped, accumulate, chats, make_instruction_data):
    settings = {
        "train": [chats],
        "validation": 3,
        "max_length": 200,
        "batch_size": 8,
        "group_by_length": grouped,
    }
    data = make_instruction_data(accumulate=accumulate, packing=True, stage="fit", **settings)
    loader = data.train_dataloader()
    lengths = scheduled_lengths(loader.dataset.steps, gold_lengths(data.tables["train"]), 200)
    masks = [batch["attention_mask"] for batch in loader]
    computed, tokens = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
    assert padding_share(lengths) == pytest.approx(1 - tokens / computed, abs=1e-12)
    row_lengths = {tuple(sorted(mask.sum(1).tolist())) for mask in masks}
    assert row_lengths == {tuple(sorted(found)) for found in lengths}


def test_evaluation_batches_are_not_packed(chats, make_instruction_data):
    data = make_instruction_data(train=[chats], validation=[chats], test=[chats], packing=True, stage="fit")
    data.setup("test")
    for batch in [*data.val_dataloader(), *data.test_dataloader()[0]]:
        assert "position_ids" not in batch
        assert len(batch["input_ids"]) == len(batch["example_ids"])


def test_packed_batch_without_examples_is_dummy(chats, make_instruction_data):
    data = make_instruction_data(test=[chats], stage="test")
    batch = TokenTable(data.tables["test"], pad_id=5, eos_id=6).batch(
        [], "all", all_candidates=False, pack_length=99
    )
    assert batch["example_ids"].tolist() == [-1]
    assert (batch["step_supervised_tokens"], len(batch["input_ids"])) == (0, 1)
    assert (batch["labels"] == IGNORE_INDEX).all()


def test_packing_reads_the_same_cache(chats, make_instruction_data, tokenized_prompts):
    for packing in (False, True):
        make_instruction_data(train=[chats], validation=1, packing=packing, stage="fit")
    assert len(tokenized_prompts) == 31
