"""SplitOverlap: how many rows that are evaluated are questions of the training split, and what is said about it."""

import json
import logging

import pytest

from gatera_lightning.datamodules.overlap import SplitOverlap, find_overlap

# --- counting, by hand ---


def test_rows_and_tasks_are_counted():
    found = find_overlap(
        ["a", "b", "b", "c"], ["x", "b", "a", "y", "b"], ["zoo", "zoo", "art", "art", "zoo"], "test"
    )
    assert found == SplitOverlap("test", of=5, rows=(1, 2, 4), tasks={"zoo": 2, "art": 1})
    assert str(found) == (
        "leakage: 3 of 5 test rows are training rows too (art 1, zoo 2; row numbers from 0: 1, 2, 4). "
        "They stay in; what is measured on them is memory."
    )


def test_no_row_is_shared():
    found = find_overlap(["a"], ["b", "c"], ["t", "t"], "validation")
    assert (found.rows, found.tasks) == ((), {})
    assert str(found) == "leakage: none of the 2 validation rows is a training row"


def test_the_line_names_the_first_five_rows():
    keys = [str(number) for number in range(1200)]
    found = find_overlap(keys[100:], keys, ["t"] * 1200, "test")
    assert found.rows == tuple(range(100, 1200))
    assert "1,100 of 1,200 test rows" in str(found)
    assert "(t 1,100; row numbers from 0: 100, 101, 102, 103, 104, …)" in str(found)
    assert "0: 0, 1, 2, 3, 4)" in str(find_overlap(keys[:5], keys, ["t"] * 1200, "test"))


# --- through the data module ---


@pytest.fixture
def sources(write, rows):
    """Training rows 0 to 5; test rows 4 to 7 as ``art`` (4 shouted) and 0, 8 as ``zoo``; validation rows 5 and 9."""
    all_rows = rows(10)
    shouted = all_rows[4] | {"instruction": all_rows[4]["instruction"].replace("Which of", "\nWHICH  of")}
    return {
        "train": [write("all.json", all_rows[:6])],
        "validation": [write("held.json", [all_rows[5], all_rows[9]])],
        "test": [write("art.json", [shouted, *all_rows[5:8]]), write("zoo.json", [all_rows[0], all_rows[8]])],
    }


@pytest.mark.parametrize("answer_format", ["label", "content"])
def test_validation_and_test_rows_against_training_rows(answer_format, sources, make_data):
    data = make_data(answer_format=answer_format, template="plain", stage="fit", **sources)
    assert data.overlaps() == [
        SplitOverlap("validation", of=2, rows=(0,), tasks={"held": 1}),
        SplitOverlap("test", of=6, rows=(0, 1, 4), tasks={"art": 2, "zoo": 1}),
        SplitOverlap("test", of=6, rows=(1,), tasks={"art": 1}, known="validation"),
    ]


def test_rows_held_out_of_training(make_data, write, rows):
    """What is held out is no training row, unless the same question is in the file twice."""
    data = make_data(train=[write("once.json", rows(12))], validation=0.25, stage="fit", test=[])
    assert data.overlaps() == [SplitOverlap("validation", of=3)]

    twice = [row for row in rows(6) for _ in range(2)]
    data = make_data(train=[write("twice.json", twice)], validation=3, stage="fit", test=[])
    (found,) = data.overlaps()
    held, trained = (data.tables[split]["example"][:] for split in ("validation", "train"))
    shared = [place for place, number in enumerate(held) if number // 2 in {other // 2 for other in trained}]
    assert shared
    assert found == SplitOverlap("validation", of=3, rows=tuple(shared), tasks={"twice": len(shared)})


def test_the_slice_of_a_test_source_counts(sources, make_data):
    data = make_data(stage="fit", **sources | {"test": [sources["test"][0] + "[:1]", sources["test"][1]]})
    assert data.overlaps()[1] == SplitOverlap("test", of=3, rows=(0, 1), tasks={"art": 1, "zoo": 1})


def test_test_rows_that_are_not_there_are_said(sources, make_data, tmp_path):
    """Training needs no test rows, and must not end for want of them."""
    data = make_data(stage="fit", **sources | {"test": [str(tmp_path / "gone.json")]})
    validation, test = data.overlaps()
    assert validation.rows == (0,)
    assert (test.rows, test.of) == ((), 0)
    assert str(test) == (
        f"leakage: test rows cannot be read here and were not compared with training rows ({tmp_path / 'gone.json'}: "
        "cannot be read (No such file or directory))"
    )


def test_a_missing_task_of_a_folder_is_said(sources, make_data, tmp_path):
    data = make_data(stage="fit", **sources | {"test": ["boolq"], "data_dir": str(tmp_path)})
    assert str(tmp_path / "boolq" / "test.json") in str(data.overlaps()[1])


def test_test_rows_that_cannot_be_used_are_said(sources, make_data, write, rows):
    bad = write("bad.json", [rows(1)[0], {"instruction": "Which?"}])
    data = make_data(stage="fit", **sources | {"test": [bad]})
    assert f"not compared with training rows ({bad}, row 2: field 'answer'" in str(data.overlaps()[1])


def test_no_test_source_says_nothing(sources, make_data):
    assert [found.split for found in make_data(stage="fit", **sources | {"test": []}).overlaps()] == [
        "validation"
    ]


# --- what is logged ---


def _logged(caplog, build):
    with caplog.at_level(logging.INFO, logger="gatera_lightning.datamodules"):
        build()
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if "leakage" in record.getMessage()
    ]


def test_fit_logs_a_warning_for_each_split_that_leaks(sources, make_data, caplog):
    lines = _logged(caplog, lambda: make_data(stage="fit", **sources))
    assert [level for level, _ in lines] == ["WARNING", "WARNING", "WARNING"]
    assert lines[2][1].startswith("leakage: 1 of 6 test rows are validation rows too (art 1;")
    assert lines[0][1].startswith("leakage: 1 of 2 validation rows are training rows too (held 1;")
    assert lines[1][1].startswith("leakage: 3 of 6 test rows are training rows too (art 2, zoo 1;")


def test_fit_logs_without_alarm_that_nothing_leaks(make_data, write, rows, caplog):
    clean = {
        split: [write(f"too_{split}.json", rows(9)[k : k + 3])]
        for split, k in (("train", 0), ("validation", 3), ("test", 6))
    }
    assert _logged(caplog, lambda: make_data(stage="fit", **clean)) == [
        ("INFO", "leakage: none of the 3 validation rows is a training row"),
        ("INFO", "leakage: none of the 3 test rows is a training row"),
    ]


def test_a_check_that_could_not_be_made_is_a_warning(sources, make_data, caplog, tmp_path):
    gone = str(tmp_path / "too far away.json")
    lines = _logged(caplog, lambda: make_data(stage="fit", **sources | {"test": [gone]}))
    assert [level for level, _ in lines] == ["WARNING", "WARNING"]
    assert "cannot be read" in lines[1][1]


@pytest.mark.parametrize(("rank", "stage"), [(1, "fit"), (0, "validate"), (0, "test"), (0, "predict")])
def test_other_ranks_and_stages_log_nothing(rank, stage, sources, make_data, caplog):
    assert _logged(caplog, lambda: make_data(ranks=2, rank=rank, stage=stage, **sources)) == []


def test_validating_on_held_out_rows_logs_nothing(sources, make_data, caplog):
    """The training rows are open, but nobody trains on them."""
    held_out = {"train": sources["train"], "test": sources["test"], "validation": 2}
    assert _logged(caplog, lambda: make_data(stage="validate", **held_out)) == []


def test_without_a_trainer_it_is_logged_too(sources, make_data, caplog):
    data = make_data(**sources)
    data.trainer = None
    assert len(_logged(caplog, lambda: data.setup("fit"))) == 3


# --- rows that ship or are real ---


def test_the_sample_splits_do_not_leak(make_data):
    data = make_data(stage="fit")
    assert data.overlaps() == [SplitOverlap("validation", of=85), SplitOverlap("test", of=144)]


REAL_LEAKS = {"ARC-Easy": (242, 493), "ARC-Challenge": ()}  # at the source, too


@pytest.mark.parametrize("task", REAL_LEAKS)
def test_real_test_rows_among_training_rows(task, real_data, make_data, tokenizers_by_kind):
    trained, tested = (
        [
            " ".join(row["instruction"].lower().split())
            for row in json.loads((real_data / task / f"{split}.json").read_text())
        ]
        for split in ("train", "test")
    )
    assert tuple(row for row, text in enumerate(tested) if text in set(trained)) == REAL_LEAKS[task]
    data = make_data(
        tokenizer=tokenizers_by_kind["words"],
        data_dir=str(real_data),
        train=[task],
        validation=1,
        test=[task],
        stage="fit",
    )
    (found,) = [found for found in data.overlaps() if found.split == "test"]
    tasks = {task: len(REAL_LEAKS[task])} if REAL_LEAKS[task] else {}
    assert found == SplitOverlap("test", of=len(tested), rows=REAL_LEAKS[task], tasks=tasks)
