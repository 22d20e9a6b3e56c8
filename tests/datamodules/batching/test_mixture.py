"""Mixtures: how often examples of each source occur, and that validation examples do not."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatera_lightning.datamodules.batching.mixture import mixture_indices, weight_problems

# --- counts ---


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ({"a": 4, "b": 2}, {"a": 2, "b": 1}, {"a": 4, "b": 2}),
        ({"a": 4, "b": 2}, {"a": 1, "b": 1}, {"a": 3, "b": 3}),
        ({"a": 4, "b": 4}, {"a": 3, "b": 1}, {"a": 6, "b": 2}),
        ({"a": 4, "b": 4}, {"a": 0.75, "b": 0.25}, {"a": 6, "b": 2}),
        ({"a": 4, "b": 4}, {"b": 1, "a": 3}, {"a": 6, "b": 2}),
        ({"a": 4, "b": 4}, {"a": 1, "b": 0}, {"a": 4}),
        ({"a": 1, "b": 99}, {"a": 1, "b": 1}, {"a": 50, "b": 50}),
        ({"a": 10, "b": 10, "c": 10}, {"a": 1, "b": 2, "c": 3}, {"a": 5, "b": 10, "c": 15}),
        ({"a": 10, "b": 10, "c": 10}, {"a": 1, "b": 0, "c": 3}, {"a": 5, "c": 15}),
        ({"a": 5, "b": 5}, {"a": 1e-9, "b": 1e-9}, {"a": 5, "b": 5}),
    ],
)
def test_mixture_counts_by_hand(sizes, weights, expected):
    tasks = [task for task, size in sizes.items() for _ in range(size)]
    assert Counter(tasks[row] for row in mixture_indices(tasks, weights, seed=0)) == expected


def test_mixture_repeats_examples_evenly():
    """11 examples in shares of 1/3 and 2/3: 4 of the 8 of a, and 7 of b from its 3."""
    tasks = ["a", "b", "a", "a", "b", "a", "a", "a", "b", "a", "a"]
    counts = Counter(mixture_indices(tasks, {"a": 1, "b": 2}, seed=0))
    assert sorted(counts[i] for i in range(11) if tasks[i] == "a") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sorted(counts[i] for i in range(11) if tasks[i] == "b") == [2, 2, 3]


def test_mixture_depends_on_seed():
    tasks = ["a"] * 40 + ["b"] * 40
    draws = [tuple(mixture_indices(tasks, {"a": 1, "b": 3}, seed=seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    assert len({i for draw in draws for i in draw if tasks[i] == "a"}) > 20


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    tasks=st.lists(st.sampled_from("abcd"), min_size=1, max_size=60),
    shares=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 50), min_size=4, max_size=4),
    seed=st.integers(0, 3),
)
def test_mixture_properties(tasks, shares, seed):
    weights = {task: weight for task, weight in shares.items() if task in tasks}
    if not any(weights.values()):
        return
    total, weight_sum = sum(weights[task] > 0 for task in tasks), sum(weights.values())
    if any(0 < Fraction(weight, weight_sum) * total < 1 for weight in weights.values()):
        return  # the share may be less than one example, which is rejected
    mixture = mixture_indices(tasks, weights, seed)
    assert mixture == sorted(mixture)
    assert mixture == mixture_indices(tasks, weights, seed)
    assert len(mixture) == total
    times = Counter(mixture)
    for task, weight in weights.items():
        counts = [times[i] for i in range(len(tasks)) if tasks[i] == task]
        assert abs(sum(counts) - Fraction(weight, weight_sum) * total) <= 1
        assert max(counts) - min(counts) <= 1
        assert (sum(counts) == 0) or weight > 0


def test_mixture_rounds_counts_to_total():
    """18 examples in shares of 1/4, 1/2 and 1/4: 4.5, 9 and 4.5."""
    tasks = ["a"] * 10 + ["b"] * 4 + ["c"] * 4
    counts = Counter(tasks[row] for row in mixture_indices(tasks, {"a": 1, "b": 2, "c": 1}, seed=0))
    assert counts == {"a": 5, "b": 9, "c": 4}


# --- invalid weights ---


@pytest.mark.parametrize(
    ("tasks", "weights", "message"),
    [
        ("aa", {"a": 1, "b": 1}, r"^b has a weight, but no training examples$"),
        ("aaaabbbb", {"a": 1000, "b": 1}, r"^b: 1 of 1001 is less than one of 8 examples$"),
    ],
)
def test_mixture_rejects_task_without_examples(tasks, weights, message):
    with pytest.raises(ValueError, match=message):
        mixture_indices(list(tasks), weights, seed=0)


@pytest.mark.parametrize(
    ("weights", "problems"),
    [
        ({"a": 1, "b": 2.5}, []),
        ({"a": 0, "b": 1}, []),
        (
            {"a": 0, "b": 0},
            ["data.weights: all are 0, which leaves no training examples; accepted: at least one above 0"],
        ),
        ({"a": -1, "b": 2}, ["data.weights: a: -1; accepted: a number of at least 0"]),
        ({"a": 1, "b": -1}, ["data.weights: b: -1; accepted: a number of at least 0"]),
        ({"a": float("nan"), "b": 1}, ["data.weights: a: nan; accepted: a number of at least 0"]),
        ({"a": float("inf"), "b": 1}, ["data.weights: a: inf; accepted: a number of at least 0"]),
        ({"a": "2", "b": 1}, ["data.weights: a: '2'; accepted: a number of at least 0"]),
        ({"a": True, "b": 1}, ["data.weights: a: True; accepted: a number of at least 0"]),
        ({"a": None, "b": 1}, ["data.weights: a: None; accepted: a number of at least 0"]),
        (
            {"a": 1e308, "b": 1e308},
            ["data.weights: their sum is too large; accepted: smaller numbers of the same ratio"],
        ),
        ([1, 2], ["data.weights: [1, 2]; accepted: a number for each of a, b"]),
        ({"a": 1}, ["data.weights: no weight for b; accepted: a number for each of a, b"]),
        ({}, ["data.weights: no weight for a, b; accepted: a number for each of a, b"]),
        ({"a": 1, "b": 1, "a.json": 1}, ["data.weights: 'a.json' is not a training source; accepted: a, b"]),
        (
            {"A": -2, "b": 0},
            [
                "data.weights: 'A' is not a training source; accepted: a, b",
                "data.weights: A: -2; accepted: a number of at least 0",
                "data.weights: no weight for a; accepted: a number for each of a, b",
            ],
        ),
    ],
)
def test_weight_problems(weights, problems):
    assert weight_problems(weights, ["a", "b", "a"]) == problems


# --- in data modules ---


@pytest.fixture
def own_sources(write):
    """Files a.json and b.json with 12 and 6 instructions."""

    def rows(name, count):
        return [
            {"instruction": f"question {name}{number}?", "output": f"{name}{number}"}
            for number in range(count)
        ]

    return [write("a.json", rows("a", 12)), write("b.json", rows("b", 6))]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        (None, {"a": 12, "b": 6}),
        ({"a": 1, "b": 1}, {"a": 9, "b": 9}),
        ({"b": 5, "a": 1}, {"a": 3, "b": 15}),
        ({"a": 1, "b": 0}, {"a": 12}),
    ],
)
def test_epoch_has_weighted_shares(weights, counts, own_sources, make_instruction_data):
    data = make_instruction_data(
        train=own_sources,
        validation=own_sources[:1],
        test=own_sources,
        weights=weights,
        batch_size=5,
        stage="fit",
    )
    assert data.problems("fit") == []
    table = data.tables["train"]
    assert Counter(table["task"]) == counts
    for _ in range(2):
        seen = [int(example) for batch in data.train_dataloader() for example in batch["example_ids"]]
        assert sorted(seen) == table["example"][:]
    assert len(data.tables["validation"]) == 12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("held_out", [5, 0.5])
def test_mixture_excludes_validation_examples(seed, held_out, own_sources, make_instruction_data):
    settings = {"train": own_sources, "validation": held_out, "test": own_sources[:1], "seed": seed}
    plain, mixed = (
        make_instruction_data(weights=weights, stage="fit", **settings)
        for weights in (None, {"a": 1, "b": 4})
    )
    held = mixed.tables["validation"]["example"][:]
    assert held == plain.tables["validation"]["example"][:]
    left = plain.tables["train"]["example"][:]
    assert sorted(held + left) == list(range(18))
    found = mixed.tables["train"]
    assert set(found["example"]) <= set(left)
    assert len(found) == len(left)
    by_b = sum(task == "b" for task in found["task"])
    assert abs(by_b - 0.8 * len(left)) < 1


def test_data_seed_draws_mixture(own_sources, make_instruction_data):
    settings = {
        "train": own_sources,
        "validation": own_sources[:1],
        "weights": {"a": 1, "b": 3},
        "stage": "fit",
    }
    draws = [make_instruction_data(seed=seed, **settings).tables["train"]["example"][:] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_slices_of_one_file_share_a_weight(own_sources, make_instruction_data):
    sources = [f"{own_sources[0]}[:4]", own_sources[1], f"{own_sources[0]}[8:]"]
    data = make_instruction_data(train=sources, validation=1, test=own_sources[:1], weights={"a": 1, "b": 1})
    assert data.problems("fit") == []
    data.held_out = None
    data.sources["validation"] = own_sources[:1]
    data.setup("fit")
    assert Counter(data.tables["train"]["task"]) == {"a": 7, "b": 7}
    assert set(data.tables["train"]["example"]) <= set(range(14))


def test_commonsense_tasks_are_mixed(make_data, write, rows):
    sources = [write("hard/train.json", rows(10)), write("easy.json", rows(14)[10:]), "everyday[:6]"]
    data = make_data(train=sources, validation=2, test=sources, weights={"hard": 1, "easy": 3, "everyday": 2})
    assert data.problems("fit") == []
    data.setup("fit")
    table = data.tables["train"]
    assert Counter(table["task"]) == {"hard": 3, "easy": 9, "everyday": 6}
    assert not set(table["example"]) & set(data.tables["validation"]["example"])


def test_source_with_zero_weight_does_not_overlap(own_sources, make_instruction_data):
    settings = {"train": own_sources, "validation": own_sources[:1], "test": own_sources[1:]}
    rows = [
        len(make_instruction_data(weights=w, stage="fit", **settings).overlaps()[1].indices)
        for w in (None, {"a": 1, "b": 0})
    ]
    assert rows == [6, 0]


@pytest.mark.parametrize(("stage", "count"), [("fit", 1), ("validate", 0), ("test", 0), ("predict", 0)])
def test_weights_are_checked_for_training_only(stage, count, own_sources, make_instruction_data):
    data = make_instruction_data(
        train=own_sources, validation=own_sources[:1], test=own_sources, weights={"a": 1}
    )
    assert (
        data.problems(stage) == ["data.weights: no weight for b; accepted: a number for each of a, b"] * count
    )


def test_weights_read_the_same_cache(own_sources, make_instruction_data, tokenized_prompts):
    for weights in (None, {"a": 1, "b": 1}, {"a": 3, "b": 1}):
        make_instruction_data(
            train=own_sources, validation=4, test=own_sources[:1], weights=weights, stage="fit"
        )
    assert len(tokenized_prompts) == 18


def test_second_setup_does_not_mix_again(own_sources, make_instruction_data):
    data = make_instruction_data(
        train=own_sources, validation=own_sources[:1], weights={"a": 1, "b": 5}, stage="fit"
    )
    before = data.tables["train"]["example"][:]
    for stage in ("validate", "fit"):
        data.setup(stage)
    assert data.tables["train"]["example"][:] == before
