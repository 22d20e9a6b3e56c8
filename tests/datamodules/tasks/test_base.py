"""What all tasks share: sources and their errors, settings that cannot work, and rows that are skipped."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from gatera_lightning.datamodules.sources.spec import ROW_SUFFIXES
from gatera_lightning.datamodules.tasks.commonsense import TASKS, CommonsenseDataModule
from gatera_lightning.errors import ConfigError


def settings_of(problems):
    """The names of the settings that have problems."""
    return [problem.split(":")[0].removeprefix("data.") for problem in problems]


# --- sources ---


@pytest.mark.parametrize(("part", "count"), [("[:3]", 3), ("[:99]", 7), ("", 7), ("[:1]", 1)])
def test_slice_takes_the_first_rows(part, count, make_data, write, rows):
    examples = make_data(train=[write("rows.json", rows(7)) + part]).examples("train")
    assert [example.prompt.count(f"number {i}?") for i, example in enumerate(examples)] == [1] * count


def test_rows_after_the_slice_are_not_checked(make_data, write, rows):
    path = write("rows.json", [*rows(2), None])
    assert len(list(make_data(train=[f"{path}[:2]"]).examples("train"))) == 2


def test_examples_are_numbered_over_all_sources(make_data, write, rows):
    sources = [write("one.json", rows(3)) + "[:2]", write("two.json", rows(5)[3:])]
    data = make_data(train=sources, stage="fit", validation=1)
    assert sorted(data.tables["train"]["example"][:] + data.tables["validation"]["example"][:]) == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("sources", [[], ["empty.json"], ["rows.json[3:]"], "rows.json[5:]"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_empty_split_is_rejected(split, sources, make_data, write, rows):
    rows_file, _ = write("rows.json", rows(3)), write("empty.json", [])
    folder = rows_file.removesuffix("rows.json")
    splits = {"train": [rows_file], "validation": [rows_file], "test": [rows_file]}
    splits[split] = folder + sources if isinstance(sources, str) else [folder + each for each in sources]
    with pytest.raises(ConfigError, match=rf"^data\.{split}: (the split is empty|no sources)"):
        make_data(stage="test" if split == "test" else "fit", **splits)


def test_variables_in_paths_are_expanded(make_data, write, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_DATA", str(tmp_path / "data"))
    write("boolq/train.json", rows(1))
    write("mine.json", rows(1))
    data = make_data(
        train=["boolq", "$MY_DATA/mine.json", "${MY_DATA}/boolq/train.json"],
        validation=1,
        data_dir="$MY_DATA",
    )
    assert data.problems("fit") == []
    assert len(list(data.examples("train"))) == 3


def test_task_may_have_any_format(make_math_data, write, tmp_path):
    row = {"question": "What is 1 + 1?", "answer": "#### 2"}
    write("gsm8k/train.json", [row])
    write("gsm8k/test.jsonl", json.dumps(row))
    write("AQuA/test.csv", "question,answer\nWhat?,#### 3\n")
    write("SVAMP/test.jsonl", json.dumps(row))  # is read instead of:
    write("SVAMP/test.json", [])
    settings = {"train": ["gsm8k"], "validation": 1, "test": ["gsm8k", "AQuA", "SVAMP"]}
    data = make_math_data(data_dir=f"{tmp_path}/data/", **settings)
    assert data.problems("fit") == data.problems("test") == []
    assert [example.task for example in data.examples("test")] == ["gsm8k", "AQuA", "SVAMP"]
    assert len(list(data.examples("train"))) == 1


def test_prepare_data_tokenizes_the_splits_of_the_stage(make_data, write, rows, token_cache):
    splits = enumerate(("train", "validation", "test"), 3)
    data = make_data(**{split: [write(f"{split}.json", rows(count))] for count, split in splits})
    data.trainer.state = SimpleNamespace(fn=SimpleNamespace(value="test"))
    data.prepare_data()
    assert len(list(token_cache.glob("*.arrow"))) == 1
    data.trainer.state = SimpleNamespace(fn=SimpleNamespace(value="fit"))
    data.prepare_data()
    assert len(list(token_cache.glob("*.arrow"))) == 3


# --- missing and malformed sources ---


def test_unknown_task_lists_accepted_sources(make_data):
    (problem,) = make_data(train=["ARC-Esay"], validation=1).problems("fit")
    accepted = f"{', '.join(TASKS)}, a file ({', '.join(ROW_SUFFIXES)}), or a hub id (owner/name)"
    hint = "; did you mean 'ARC-Easy'?"
    assert problem == f"data.train: task 'ARC-Esay' is unknown; accepted: {accepted}{hint}"


def test_missing_task_lists_the_folders_of_data_dir(make_data, write, rows, tmp_path):
    write("ARC-Easy/train.json", rows(1))
    write("boolq/test.json", rows(1))
    write("notes.txt", "not a task")
    folder = tmp_path / "data"
    data = make_data(train=["ARC-Easy", "boolq"], validation=1, data_dir=str(folder))
    missing = f"data.train: task 'boolq' needs the file {folder}/boolq/train.json, which does not exist"
    assert data.problems("fit") == [f"{missing}; {folder} contains ARC-Easy, boolq"]
    (problem,) = make_data(train=["boolq"], validation=1, data_dir=f"{folder}/none").problems("fit")
    assert problem.endswith(
        f"/none/boolq/train.json, which does not exist; {folder}/none contains no task folders"
    )


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("/gone.jsonl[:5]", "the file /gone.jsonl does not exist"),
        (
            "boolq[:-5]",
            "'boolq[:-5]' has no valid slice; accepted: [start:stop] with optional non-negative integers",
        ),
        ("/notes.txt", f"'/notes.txt' has an unknown file format; accepted: {', '.join(ROW_SUFFIXES)}"),
        ("$NOWHERE/a/b.json", "'$NOWHERE/a/b.json': the variable $NOWHERE in $NOWHERE/a/b.json is not set"),
    ],
)
def test_source_problems(source, problem, make_data, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    assert make_data(train=[source], validation=1).problems("fit") == [f"data.train: {problem}"]


def test_source_that_is_no_regular_file_is_named(make_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder.json", "folder", "a/b"):
        (tmp_path / name).mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "table.xlsx").touch()
    sources = ["folder.json", "folder", "a/b", "./folder", "pipe.jsonl", "table.xlsx", "x/rows.arrow"]
    sources += ["[5:3]", "boolq[5:3]", "boolq[2:2]", "", 5, None, ["boolq"]]
    problems = make_data(train=sources, validation=1).problems("fit")
    accepted = ", ".join(ROW_SUFFIXES)
    folder = f"is a folder; accepted: a file ({accepted})"
    unknown = f"has an unknown file format; accepted: {accepted}"
    assert [problem.removeprefix("data.train: ") for problem in problems[:7]] == [
        *(f"{name!r} {folder}" for name in sources[:4]),
        "'pipe.jsonl' is a pipe or a device; accepted: a regular file",
        *(f"{name!r} {unknown}" for name in sources[5:7]),
    ]
    assert len(problems) == len(sources)
    assert "selects no rows" in problems[8]
    assert "accepted: a task name, a file, a URL or a hub id" in problems[-1]


def test_a_single_source_needs_no_list(make_data, write, rows):
    path = write("rows.json", rows(3))
    for source in (path, Path(path), (path,), f"{path}[:3]"):
        data = make_data(train=source, validation=source, test=source)
        assert data.problems("fit") == data.problems("test") == []
        assert [len(list(data.examples(split))) for split in ("train", "validation", "test")] == [3, 3, 3]


def test_slices_beyond_the_data_are_reported(make_data, write, rows, caplog):
    path = write("rows.json", rows(3))
    data = make_data(train=[f"{path}[1:9]"], test=[path, f"{path}[7:]"])
    with caplog.at_level(logging.WARNING):
        assert len(list(data.examples("train"))) == len(list(data.examples("train"))) == 2
    (record,) = caplog.records
    message = f"data.train: '{path}[1:9]' goes beyond the 3 rows of {path}; 2 are used"
    assert record.getMessage() == message
    with pytest.raises(ConfigError, match=rf"^data\.test: '{path}\[7:\]' selects no rows; {path} has 3$"):
        list(data.examples("test"))


@pytest.mark.parametrize("error", [KeyError("capital"), RecursionError(), ValueError("is \x1b[31mred")])
def test_errors_of_a_task_name_the_row(error, make_data, write, rows, monkeypatch):
    """A task that reads ``row["capital"]`` needs no check of its own."""

    def example(self, row, task):
        raise error

    path = write("rows.json", rows(1))
    monkeypatch.setattr(CommonsenseDataModule, "example", example)
    with pytest.raises(ConfigError) as caught:
        list(make_data(train=[path]).examples("train"))
    assert str(caught.value).startswith(f"{path}, row 1: ")
    assert str(caught.value).isprintable()


def test_names_must_be_unique_where_they_matter(make_data, write, rows):
    sources = [write("a/rows.json", rows(1)), write("b/rows.json", rows(1))]
    same_name = f"{sources[0]} and {sources[1]} have the same name, 'rows'"
    assert make_data(train=sources, validation=1).problems("fit") == []
    (problem,) = make_data(test=sources).problems("test")
    assert problem.startswith(f"data.test: {same_name}")
    problems = make_data(train=sources, validation=1, weights={"rows": 1}).problems("fit")
    assert [problem.startswith(f"data.train: {same_name}") for problem in problems] == [True]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_malformed_row_is_reported_with_file_row_and_field(suffix, make_data, write, rows):
    good, bad = rows(1)[0], rows(1)[0] | {"answer": "answer9"}
    content = [good, bad, good]
    path = write(f"bad.{suffix}", content if suffix == "json" else "\n".join(map(json.dumps, content)))
    with pytest.raises(ConfigError) as caught:
        list(make_data(train=[path]).examples("train"))
    assert str(caught.value).startswith(f"{path}, row 2: field 'answer': 'answer9'")


# --- settings ---


def test_all_problems_are_reported_at_once(make_data):
    data = make_data(
        template="vicuna",
        answer_format="letter",
        train_on="prompt",
        max_length=0,
        batch_size=0,
        eval_batch_size=-1,
        token_budget=0,
        evaluate_by=["guessing"],
        train=["nope", "/gone.json"],
        validation=["boolq"],
        test=["neither"],
    )
    assert sorted(settings_of(data.problems("fit"))) == [
        *("answer_format", "batch_size", "eval_batch_size", "evaluate_by", "max_length", "template"),
        *("token_budget", "train", "train", "train_on", "validation"),
    ]


@pytest.mark.parametrize(
    ("setting", "value", "accepted"),
    [
        ("template", "vicuna", "alpaca, plain, chat"),
        ("answer_format", "letter", "label, content"),
        ("train_on", "prompt", "response, every_response, all"),
        ("max_length", 0, "at least 1"),
        ("token_budget", -5, "null, or an integer of at least 1"),
        *(
            ("validation", value, "an integer of at least 1, or a share between 0 and 1")
            for value in (0, -3, 0.0, 1.0, 1.5, -0.1, float("nan"), True, False)
        ),
        *(
            ("evaluate_by", value, "a list of likelihood and generation, each at most once")
            for value in ([], ["ranking"], ["likelihood", "ranking"], ["likelihood", "likelihood"])
        ),
    ],
)
def test_problem_names_setting_value_and_accepted_values(setting, value, accepted, make_data):
    (problem,) = make_data(**{setting: value}).problems("fit")
    assert problem.startswith(f"data.{setting}: ")
    assert str(value) in problem
    assert accepted in problem


@pytest.mark.parametrize("setting", ["template", "answer_format", "train_on"])
def test_required_setting_is_not_set(setting, make_data):
    (problem,) = make_data(**{setting: None}).problems("fit")
    assert problem.startswith(f"data.{setting}: is not set; accepted: ")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *({"validation": value} for value in (1, 7, 0.1, 0.999, 1e-9)),
        *({"evaluate_by": value} for value in (["generation"], ["generation", "likelihood"])),
    ],
)
def test_valid_settings_have_no_problems(settings, make_data):
    for stage in ("fit", "validate", "test", "predict"):
        assert make_data(**settings).problems(stage) == []


@pytest.mark.parametrize(
    ("stage", "splits"),
    [
        ("fit", ["train", "validation"]),
        ("validate", ["validation"]),
        ("test", ["test"]),
        ("predict", ["test"]),
    ],
)
def test_problems_check_sources_of_stage_only(stage, splits, make_data):
    data = make_data(train=["/a.json"], validation=["/b.json"], test=["/c.json"])
    assert settings_of(data.problems(stage)) == splits
    if stage == "validate":
        data = make_data(train=["/a.json"], validation=5)
        assert settings_of(data.problems(stage)) == ["train"]


def test_missing_sources(make_data, tmp_path):
    accepted = "no sources; accepted: a list of task names, files or hub ids"
    assert make_data(data_dir=str(tmp_path)).problems("fit") == [
        f"data.train: {accepted}",
        f"data.validation: {accepted}, or a number of examples to take from training",
    ]


def test_own_training_data_disables_sample_defaults(make_data):
    data = make_data(train=["/mine.json"])
    assert settings_of(data.problems("fit")) == ["train", "validation"]
    assert settings_of(data.problems("test")) == ["test"]


# --- rows without a correct answer ---

UNUSABLE = {"question": "What is 1 + 1?", "answer": "two"}
USABLE = {"question": "What is 1 + 1?", "answer": "#### 2"}


def test_skipped_rows_are_counted_and_listed(make_math_data, write, caplog):
    one = write("one.json", [UNUSABLE, USABLE, UNUSABLE])
    two = write("two.json", [UNUSABLE] * 2)
    with caplog.at_level(logging.WARNING):
        assert len(list(make_math_data(test=[one, two]).examples("test"))) == 1
        list(make_math_data(test=[one] * 2 + [two]).examples("test"))
    short, long = (record.getMessage() for record in caplog.records)
    assert short.startswith(
        f"data.test: skipped 4 rows without a usable answer: {one}, row 1: field 'answer': "
    )
    assert f"; {one}, row 3: " in short
    assert short.count(", row ") == 4
    assert not short.endswith("…")
    assert long.startswith("data.test: skipped 6 rows ")
    assert long.count(", row ") == 5
    assert long.endswith("; …")


def test_slice_counts_skipped_rows(make_math_data, write, caplog):
    path = write("rows.json", [UNUSABLE, USABLE, USABLE])
    assert len(list(make_math_data(test=[f"{path}[:2]"]).examples("test"))) == 1
    assert "data.test: skipped 1 rows" in caplog.text


def test_split_of_skipped_rows_is_empty(make_math_data, write):
    with pytest.raises(ConfigError, match=r"^data\.test: the split is empty"):
        make_math_data(test=[write("rows.json", [UNUSABLE])], stage="test")
