"""Validation examples taken from the training split: how many, which ones, and groups that stay together."""

import numpy as np
import pytest

from gatera_lightning.datamodules.batching.holdout import validation_mask
from gatera_lightning.errors import ConfigError


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("seed", [0, 5])
def test_mask_without_groups_is_the_beginning_of_a_permutation(count, seed):
    order = np.random.default_rng(seed).permutation(count)
    for size in {1, count // 2, count - 1} - {0}:
        mask = validation_mask([""] * count, size, seed)
        assert np.flatnonzero(mask).tolist() == sorted(order[:size].tolist())


def test_mask_does_not_divide_groups():
    groups = [f"g{k % 5}" if k % 7 else "" for k in range(60)]
    masks = set()
    for seed in range(20):
        mask = validation_mask(groups, 10, seed)
        validation = {group or i for i, group in enumerate(groups) if mask[i]}
        training = {group or i for i, group in enumerate(groups) if not mask[i]}
        assert not validation & training
        assert 10 <= mask.sum() < 10 + max(groups.count(f"g{k}") for k in range(5))
        masks.add(tuple(mask.tolist()))
    assert len(masks) > 10


def test_mask_takes_no_more_groups_than_necessary():
    assert validation_mask(["a", "a", "b", "b"], 2, 0).sum() == 2
    assert validation_mask(["a", "a", "b", "b"], 3, 0).sum() == 4


def examples_of(data, split):
    return data.tables[split]["example"][:]


@pytest.mark.parametrize(
    ("validation", "total", "expected"),
    [(6, 20, 6), (0.1, 20, 2), (0.3, 20, 6), (0.5, 4, 2), (0.1, 3, 1), (1e-9, 2, 1), (0.9, 10, 9)],
)
def test_number_or_share_of_validation_examples(validation, total, expected, make_data, write, rows):
    data = make_data(train=[write("rows.json", rows(total))], validation=validation, stage="fit")
    assert len(examples_of(data, "validation")) == expected
    assert sorted(examples_of(data, "train") + examples_of(data, "validation")) == list(range(total))


def test_validation_examples_depend_on_seed_and_count_only(make_data, write, rows):
    source = [write("rows.json", rows(20))]

    def validation(size, seed, stage):
        return examples_of(make_data(train=source, validation=size, seed=seed, stage=stage), "validation")

    assert validation(2, 1, "fit") == validation(2, 1, "validate") == validation(0.1, 1, "fit")
    assert validation(6, 1, "fit") != validation(6, 2, "fit")


def test_repeated_setup_takes_validation_examples_once(make_data, write, rows):
    data = make_data(train=[write("rows.json", rows(20))], validation=6, stage="validate")
    data.setup("fit")
    data.setup("fit")
    assert (len(data.tables["train"]), len(data.tables["validation"])) == (14, 6)


@pytest.mark.parametrize("validation", [5, 6, 0.95])
def test_some_examples_must_remain_to_train_on(validation, make_data, write, rows):
    message = f"^data.validation: {validation} of 5 training examples leaves none to train on$"
    with pytest.raises(ConfigError, match=message):
        make_data(train=[write("rows.json", rows(5))], validation=validation, stage="fit")
