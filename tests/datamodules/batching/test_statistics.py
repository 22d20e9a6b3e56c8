"""Statistics of a split agree with its batches."""

import random
from statistics import median_low

import pytest
from datasets import Dataset

from gatera_lightning.datamodules.batching.batch_schedule import OptimizerStep, build_batch_schedule
from gatera_lightning.datamodules.batching.statistics import (
    SplitStatistics,
    gold_lengths,
    padding_share,
    scheduled_lengths,
    supervised_token_counts,
)


def computed_padding_share(batches):
    """Share of padding in collated batches."""
    masks = [batch["attention_mask"] for batch in batches]
    return sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)


@pytest.fixture
def data(make_data, rows, write):
    """A connected data module with so many examples in each split."""

    def build(train=23, validation=11, test=13, stage="fit", **settings):
        sizes = {"train": train, "validation": validation, "test": test}
        files = {split: [write(f"task_{split}.json", rows(count))] for split, count in sizes.items()}
        return make_data(stage=stage, **(files | {"batch_size": 8, "eval_batch_size": 9} | settings))

    return build


# --- padding ---


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("budget", [None, 500])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_padding_share_matches_training_batches(data, grouped, budget, accumulate):
    module = data(accumulate=accumulate, group_by_length=grouped, token_budget=budget)
    loader = module.train_dataloader()
    lengths = SplitStatistics.from_table(module.tables["train"], module.train_on).lengths
    found = padding_share(scheduled_lengths(loader.dataset.steps, lengths))
    assert found == pytest.approx(computed_padding_share(loader), abs=1e-12)
    assert found > 0


def test_padding_share_matches_batches_of_all_ranks(data):
    masks = []
    for rank in range(2):
        module = data(ranks=2, rank=rank, accumulate=2)
        masks += list(module.train_dataloader())
    lengths = SplitStatistics.from_table(module.tables["train"], "response").lengths
    steps = build_batch_schedule(lengths, lengths, batch_size=8, micro_batches=4, seed=0)
    assert padding_share(scheduled_lengths(steps, lengths)) == pytest.approx(
        computed_padding_share(masks), abs=1e-12
    )


@pytest.mark.parametrize("every", [True, False])
def test_padding_share_matches_validation_batches(data, every):
    module = data(rank_validation=every)
    loader = module.val_dataloader()
    assert padding_share(loader.dataset.row_lengths()) == pytest.approx(
        computed_padding_share(loader), abs=1e-12
    )


def test_padding_share_matches_test_batches(data):
    module = data(stage="test", evaluate_by=["likelihood", "generation"])
    shares = [padding_share(loader.dataset.row_lengths()) for loader in module.test_dataloader()]
    assert shares == pytest.approx(
        [computed_padding_share(loader) for loader in module.test_dataloader()], abs=1e-12
    )
    assert shares[0] != shares[1]


def test_padding_share_by_hand():
    assert padding_share([[3, 5], [4]]) == pytest.approx(2 / 14)
    assert padding_share([[7, 7, 7]]) == 0
    steps = [OptimizerStep(((0, 1), (2,)), supervised_tokens=3, tokens=12)]
    assert scheduled_lengths(steps, [3, 5, 4]) == [[3, 5], [4]]


@pytest.mark.parametrize(
    ("pack_length", "expected"),
    [
        (None, [[9, 1, 2], [4, 5]]),
        (9, [[9, 3], [9]]),
        (8, [[9, 3], [5, 4]]),
        (11, [[9, 3], [9]]),
        (99, [[12], [9]]),
    ],
)
def test_scheduled_lengths_of_packed_sequences(pack_length, expected):
    steps = [OptimizerStep(((0, 1, 2), (4, 3)), supervised_tokens=1, tokens=21)]
    found = scheduled_lengths(steps, [9, 1, 2, 5, 4], pack_length)
    assert [sorted(lengths, reverse=True) for lengths in found] == [
        sorted(lengths, reverse=True) for lengths in expected
    ]


# --- token counts ---


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_token_counts_match_batches(data, train_on):
    module = data(train_on=train_on)
    found = SplitStatistics.from_table(module.tables["train"], train_on)
    batches = list(module.train_dataloader())
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert found.supervised_tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    by_example = {
        int(example): int(count)
        for batch in batches
        for example, count in zip(batch["example_ids"], batch["attention_mask"].sum(1), strict=True)
    }
    assert found.lengths == [by_example[i] for i in range(23)]


@pytest.mark.parametrize("train_on", ["response", "every_response", "all"])
@pytest.mark.parametrize("max_length", [512, 160, 80])
def test_supervised_token_counts_match_chat_batches(train_on, max_length, make_instruction_data):
    settings = {"train": ["calendar[:30]"], "validation": ["calendar"], "test": ["calendar"], "batch_size": 7}
    module = make_instruction_data(train_on=train_on, max_length=max_length, stage="fit", **settings)
    batches = list(module.train_dataloader())
    by_example = {
        int(example): int(count)
        for batch in batches
        for example, count in zip(batch["example_ids"], (batch["labels"] != -100).sum(1), strict=True)
    }
    counts = supervised_token_counts(module.tables["train"], train_on)
    assert counts == [by_example[i] for i in range(30)]
    assert SplitStatistics.from_table(module.tables["train"], train_on).supervised_tokens == sum(counts)


def test_supervised_token_counts_by_hand():
    rows = {"prompt": [[1] * 6, [1] * 3], "lengths": [[9, 8], [4, 7]], "gold": [1, 0], "task": ["a", "a"]}
    table = Dataset.from_dict(rows | {"truncated": [False] * 2, "earlier_responses": [[[0, 2], [3, 5]], []]})
    assert gold_lengths(table) == [8, 4]
    assert supervised_token_counts(table, "response") == [2, 1]
    assert supervised_token_counts(table, "every_response") == [1 + 2 + 2, 1]
    assert supervised_token_counts(table, "all") == [7, 3]


def test_length_quantile_is_an_existing_length():
    draw = random.Random(0)
    for count in (1, 2, 7, 20, 100, 333):
        lengths = [draw.randint(1, 400) for _ in range(count)]
        found = SplitStatistics({}, lengths, supervised_tokens=0, truncated=0)
        assert (found.length_quantile(0), found.length_quantile(0.5), found.length_quantile(1)) == (
            min(lengths),
            median_low(lengths),
            max(lengths),
        )
        ordered = sorted(lengths)
        expected = next(n for i, n in enumerate(ordered, 1) if 100 * i >= 95 * count)
        assert found.length_quantile(0.95) == expected


def test_tasks_keep_order_of_appearance(data, rows, write):
    module = data(stage=None)
    module.sources["train"] = [
        write(f"{name}.json", rows(count)) for name, count in (("zebra", 3), ("ant", 9), ("mole", 1))
    ]
    module.setup("fit")
    found = SplitStatistics.from_table(module.tables["train"], "response")
    assert list(found.tasks.items()) == [("zebra", 3), ("ant", 9), ("mole", 1)]


def test_truncated_counts_prompts_above_max_length(data):
    untruncated = [max(lengths) for lengths in data().tables["train"]["lengths"]]
    max_length = median_low(untruncated)
    found = SplitStatistics.from_table(data(max_length=max_length).tables["train"], "response")
    assert found.truncated == sum(length > max_length for length in untruncated)
    assert 0 < found.truncated < len(untruncated)
    assert found.length_quantile(1) == max_length


def test_first_token_without_prompt_is_not_supervised():
    rows = {"prompt": [[], [1, 2]], "lengths": [[3, 4], [5]], "gold": [1, 0], "task": ["a", "a"]}
    rows |= {"truncated": [False, True], "earlier_responses": [[], []]}
    table = Dataset.from_dict(rows)
    found = SplitStatistics.from_table(table, "response")
    assert (found.lengths, found.supervised_tokens, found.truncated) == ([4, 5], 3 + 3, 1)
    assert SplitStatistics.from_table(table, "all").supervised_tokens == 3 + 4
