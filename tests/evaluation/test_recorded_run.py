"""Reading of a finished evaluation: its folder, its files, and the names of several runs."""

import pytest
from recorded_runs import example_line

from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.recorded_run import read_run
from gatera_lightning.evaluation.run_labels import run_labels

GATERA, HIRA = {"update": "hira", "gate": "token"}, {"update": "hira", "gate": "none"}


def test_read_run_sorts_examples_by_task_and_index(write):
    lines = [example_line("b", 1), example_line("a", 3), example_line("a", 2)]
    found = read_run(write("run", lines, GATERA))
    assert [(example.task, example.example) for example in found.examples] == [("a", 2), ("a", 3), ("b", 1)]
    assert found.method == "hira × token"


def test_read_run_names_folders_with_predictions(write, tmp_path):
    below = write("runs/x/version_0", [example_line()])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no predictions.jsonl.*these have: .*version_0") as caught:
        read_run(tmp_path / "runs")
    assert str(below) in str(caught.value)
    with pytest.raises(ConfigError, match="nor has any folder below"):
        read_run(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(ConfigError, match="is empty"):
        read_run(write("nothing", []))


@pytest.mark.parametrize("name", ["test_results.json", "evaluation.json"])
def test_read_run_rejects_invalid_json_beside_predictions(write, name):
    folder = write("run", [example_line()])
    (folder / name).write_text("{")
    with pytest.raises(ConfigError, match=rf"{name}: is not JSON"):
        read_run(folder)


def test_run_labels_are_methods_or_distinct_folders(write):
    def labels(*places):
        return run_labels([read_run(write(place, [example_line()], adapter)) for place, adapter in places])

    assert labels(("p/v0", GATERA), ("q/v0", HIRA)) == ["hira × token", "hira × none"]
    assert labels(("r/v0", GATERA), ("s/v1", GATERA), ("t/v0", HIRA)) == [
        "hira × token (r/v0)",
        "hira × token (s/v1)",
        "hira × none",
    ]
    assert labels(("u/one", None), ("u/two", None)) == ["one", "two"]
    assert labels(("v/x", None), ("w/x", None), ("w/y", {"update": 3})) == ["v/x", "w/x", "y"]


def test_run_labels_of_files_in_one_folder_are_file_names(write):
    write("f", [example_line()], GATERA)
    runs = [read_run(write("f", [example_line()], file=name)) for name in ("one.jsonl", "two.jsonl")]
    assert run_labels(runs) == ["one.jsonl", "two.jsonl"]
