"""Train/test overlap: how many evaluated questions are also training questions, and what is logged."""

import json
import logging

import pytest

from gatera_lightning.datamodules import InstructionDataModule
from gatera_lightning.datamodules.overlap import SplitOverlap, find_overlap

# --- by hand ---


def test_find_overlap_counts_examples_and_tasks():
    found = find_overlap(
        ["a", "b", "b", "c"], ["x", "b", "a", "y", "b"], ["zoo", "zoo", "art", "art", "zoo"], "test"
    )
    assert found == SplitOverlap("test", size=5, indices=(1, 2, 4), tasks={"zoo": 2, "art": 1})
    assert str(found) == (
        "train/test overlap: 3 of 5 test examples are also in train (art 1, zoo 2; indices 1, 2, 4). "
        "They are not removed; test results on them measure memorization."
    )


def test_find_overlap_without_overlap():
    found = find_overlap(["a"], ["b", "c"], ["t", "t"], "validation")
    assert (found.indices, found.tasks) == ((), {})
    assert str(found) == "train/validation overlap: none of 2 validation examples"


def test_overlap_report_names_first_five_indices():
    keys = [str(number) for number in range(1200)]
    found = find_overlap(keys[100:], keys, ["t"] * 1200, "test")
    assert found.indices == tuple(range(100, 1200))
    assert "1,100 of 1,200 test examples" in str(found)
    assert "(t 1,100; indices 100, 101, 102, 103, 104, …)" in str(found)
    assert "indices 0, 1, 2, 3, 4)" in str(find_overlap(keys[:5], keys, ["t"] * 1200, "test"))


def test_find_overlap_counts_requests_with_another_response_apart():
    """Example 0 is also in train, 1 has a request of train, 2 has both in one, 3 neither."""
    found = find_overlap(
        ["ab", "cd"],
        ["ab", "ax", "cd", "xy"],
        ["t"] * 4,
        "test",
        other_requests=["a", "c"],
        requests=["a", "a", "c", "x"],
    )
    assert (found.indices, found.reanswered) == ((0, 2), (1,))
    assert str(found) == (
        "train/test overlap: 2 of 4 test examples are also in train (t 2; indices 0, 2); "
        "1 have a request of train with another response (indices 1). "
        "They are not removed; test results on them measure memorization."
    )
    alone = find_overlap([], ["k"], ["t"], "test", other_requests=["a"], requests=["a"])
    assert str(alone).startswith("train/test overlap: none of 1 test examples; 1 have a request of train")


# --- in the data module ---


@pytest.fixture
def sources(write, rows):
    """Train: questions 0 to 5; test: 4 (in capitals) to 7 in art, 0 and 8 in zoo; validation: 5 and 9."""
    all_rows = rows(10)
    capitals = all_rows[4] | {"instruction": all_rows[4]["instruction"].replace("Which of", "\nWHICH  of")}
    return {
        "train": [write("all.json", all_rows[:6])],
        "validation": [write("held.json", [all_rows[5], all_rows[9]])],
        "test": [
            write("art.json", [capitals, *all_rows[5:8]]),
            write("zoo.json", [all_rows[0], all_rows[8]]),
        ],
    }


@pytest.mark.parametrize("answer_format", ["label", "content"])
def test_overlaps_compare_all_splits(answer_format, sources, make_data):
    data = make_data(answer_format=answer_format, template="plain", stage="fit", **sources)
    assert data.overlaps() == [
        SplitOverlap("validation", size=2, indices=(0,), tasks={"held": 1}),
        SplitOverlap("test", size=6, indices=(0, 1, 4), tasks={"art": 2, "zoo": 1}),
        SplitOverlap("test", size=6, indices=(1,), tasks={"art": 1}, other="validation"),
    ]


def test_overlaps_with_held_out_validation_split(make_data, write, rows):
    """There is none, unless the file contains the same question twice."""
    data = make_data(train=[write("once.json", rows(12))], validation=0.25, stage="fit", test=[])
    assert data.overlaps() == [SplitOverlap("validation", size=3)]

    twice = [row for row in rows(6) for _ in range(2)]
    data = make_data(train=[write("twice.json", twice)], validation=3, stage="fit", test=[])
    (found,) = data.overlaps()
    validation, train = (data.tables[split]["example"][:] for split in ("validation", "train"))
    shared = [i for i, number in enumerate(validation) if number // 2 in {other // 2 for other in train}]
    assert shared
    assert found == SplitOverlap("validation", size=3, indices=tuple(shared), tasks={"twice": len(shared)})


def test_overlaps_respect_slices(sources, make_data):
    data = make_data(stage="fit", **sources | {"test": [sources["test"][0] + "[:1]", sources["test"][1]]})
    assert data.overlaps()[1] == SplitOverlap("test", size=3, indices=(0, 1), tasks={"art": 1, "zoo": 1})


def test_missing_test_file_is_reported(sources, make_data, tmp_path):
    """Training does not need test examples."""
    data = make_data(stage="fit", **sources | {"test": [str(tmp_path / "gone.json")]})
    validation, test = data.overlaps()
    assert validation.indices == (0,)
    assert (test.indices, test.size) == ((), 0)
    assert str(test).startswith(
        f"train/test overlap: not checked, because the test examples cannot be read ({tmp_path / 'gone.json'}"
    )


def test_missing_test_task_is_reported(sources, make_data, tmp_path):
    data = make_data(stage="fit", **sources | {"test": ["boolq"], "data_dir": str(tmp_path)})
    assert str(tmp_path / "boolq" / "test.json") in str(data.overlaps()[1])


def test_invalid_test_row_is_reported(sources, make_data, write, rows):
    invalid = write("bad.json", [rows(1)[0], {"instruction": "Which?"}])
    data = make_data(stage="fit", **sources | {"test": [invalid]})
    assert f"cannot be read ({invalid}, row 2: " in str(data.overlaps()[1])


def test_overlaps_without_test_source(sources, make_data):
    found = make_data(stage="fit", **sources | {"test": []}).overlaps()
    assert [overlap.split for overlap in found] == ["validation"]


REQUESTS = {
    "same_response": ({"instruction": "Say hi.", "output": "Hi."}, (0,), ()),
    "other_response": ({"instruction": "say  HI.", "output": "Hello."}, (), (0,)),
    "other_input": ({"instruction": "Say hi.", "input": "in French", "output": "Salut."}, (), ()),
    "as_chat": (
        {
            "messages": [
                {"role": "user", "content": "Say hi."},
                {"role": "assistant", "content": "Good day."},
            ]
        },
        (),
        (0,),
    ),
    "longer_chat": (
        {
            "messages": [
                {"role": "user", "content": "Say hi."},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": "Again."},
                {"role": "assistant", "content": "Hi."},
            ]
        },
        (),
        (),
    ),
}


@pytest.mark.parametrize(("row", "indices", "reanswered"), REQUESTS.values(), ids=REQUESTS)
def test_own_data_overlaps_by_request(row, indices, reanswered, write, tokenizers_by_kind):
    data = InstructionDataModule(
        template="plain",
        train_on="response",
        train=[write("train.json", [{"instruction": "Say hi.", "output": "Hi."}])],
        validation=[write("validation.json", [row])],
        test=[write("test.json", [row])],
    )
    data.connect(tokenizers_by_kind["words"])
    data.setup("fit")
    validation, test, *_ = data.overlaps()
    assert (validation.indices, validation.reanswered) == (test.indices, test.reanswered)
    assert (test.indices, test.reanswered) == (indices, reanswered)


# --- log ---


def _logged(caplog, build):
    with caplog.at_level(logging.INFO, logger="gatera_lightning.datamodules"):
        build()
    records = [(record.levelname, record.getMessage()) for record in caplog.records]
    return [(level, message) for level, message in records if "overlap" in message]


def test_fit_warns_of_each_overlap(sources, make_data, caplog):
    lines = _logged(caplog, lambda: make_data(stage="fit", **sources))
    assert [level for level, _ in lines] == ["WARNING"] * 3
    assert lines[0][1].startswith(
        "train/validation overlap: 1 of 2 validation examples are also in train (held"
    )
    assert lines[1][1].startswith("train/test overlap: 3 of 6 test examples are also in train (art 2, zoo 1;")
    assert lines[2][1].startswith("validation/test overlap: 1 of 6 test examples are also in validation (art")


def test_fit_logs_absence_of_overlap(make_data, write, rows, caplog):
    clean = {
        split: [write(f"too_{split}.json", rows(9)[k : k + 3])]
        for split, k in (("train", 0), ("validation", 3), ("test", 6))
    }
    assert _logged(caplog, lambda: make_data(stage="fit", **clean)) == [
        ("INFO", "train/validation overlap: none of 3 validation examples"),
        ("INFO", "train/test overlap: none of 3 test examples"),
    ]


def test_fit_warns_of_unreadable_test_split(sources, make_data, caplog, tmp_path):
    missing = str(tmp_path / "missing.json")
    lines = _logged(caplog, lambda: make_data(stage="fit", **sources | {"test": [missing]}))
    assert [level for level, _ in lines] == ["WARNING", "WARNING"]
    assert "cannot be read" in lines[1][1]


@pytest.mark.parametrize(("rank", "stage"), [(1, "fit"), (0, "validate"), (0, "test"), (0, "predict")])
def test_other_ranks_and_stages_log_no_overlap(rank, stage, sources, make_data, caplog):
    assert _logged(caplog, lambda: make_data(ranks=2, rank=rank, stage=stage, **sources)) == []


def test_validate_on_held_out_split_logs_no_overlap(sources, make_data, caplog):
    """The training split is open, but is not trained on."""
    held_out = {"train": sources["train"], "test": sources["test"], "validation": 2}
    assert _logged(caplog, lambda: make_data(stage="validate", **held_out)) == []


def test_overlap_is_logged_without_trainer(sources, make_data, caplog):
    data = make_data(**sources)
    data.trainer = None
    assert len(_logged(caplog, lambda: data.setup("fit"))) == 3


# --- shipped and published data ---


def test_samples_do_not_overlap(make_data):
    data = make_data(stage="fit")
    assert data.overlaps() == [SplitOverlap("validation", size=85), SplitOverlap("test", size=144)]


PUBLISHED_OVERLAPS = {"ARC-Easy": (242, 493), "ARC-Challenge": ()}  # as in the original data sets


@pytest.mark.slow
@pytest.mark.parametrize("task", PUBLISHED_OVERLAPS)
def test_overlap_of_published_data(task, real_data, make_data, tokenizers_by_kind):
    train, test = (
        [
            " ".join(row["instruction"].lower().split())
            for row in json.loads((real_data / task / f"{split}.json").read_text())
        ]
        for split in ("train", "test")
    )
    indices = PUBLISHED_OVERLAPS[task]
    assert tuple(i for i, text in enumerate(test) if text in set(train)) == indices
    data = make_data(
        tokenizer=tokenizers_by_kind["words"],
        data_dir=str(real_data),
        train=[task],
        validation=1,
        test=[task],
        stage="fit",
    )
    (found,) = [overlap for overlap in data.overlaps() if overlap.split == "test"]
    tasks = {task: len(indices)} if indices else {}
    assert found == SplitOverlap("test", size=len(test), indices=indices, tasks=tasks)
