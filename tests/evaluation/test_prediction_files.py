"""Files of predictions: what is written can be read again, and corrupt lines are named."""

import pytest

from gatera_lightning import ConfigError
from gatera_lightning.evaluation.prediction_files import (
    PREDICTIONS_FILE,
    PartFile,
    delete_predictions,
    read_records,
    write_predictions,
)
from gatera_lightning.evaluation.predictions import TextWithReference, generation_record


def test_part_file_is_readable_after_every_batch(tmp_path):
    part = PartFile(tmp_path, 0)
    record = {"text": "one\u2028two\x85😀", "answer": None, "choice": None}
    part.write({("generation", 4): record, ("generation", 2): record})
    assert read_records(tmp_path) == {
        ("generation", 4): record,
        ("generation", 2): record,
    }  # before it is closed
    part.close()


def test_part_files_never_share_a_name(tmp_path):
    """Not even after one was deleted, as the error about a corrupt one suggests."""
    for _ in range(3):
        PartFile(tmp_path, 0).close()
    PartFile(tmp_path, 1).close()
    (tmp_path / "part-0-0.jsonl").unlink()
    PartFile(tmp_path, 0).close()
    assert len(list(tmp_path.glob("part-0-*"))) == 3
    assert len(list(tmp_path.glob("part-1-*"))) == 1


def test_read_records_reads_texts_with_and_without_scores(tmp_path):
    """Part files have no scores yet; the merged file has them."""
    record = generation_record(TextWithReference("one\u2028two", "three\x85four"))
    part = PartFile(tmp_path, 0)
    part.write({("generation", 4): record})
    part.close()
    assert read_records(tmp_path) == {("generation", 4): record}
    scored = record | {"scores": {"token_f1": 0.1}}
    write_predictions(tmp_path, [{"task": "t", "example": 4, "key": "k", "gold": 0, "generation": scored}])
    assert read_records(tmp_path) == {("generation", 4): scored}


@pytest.mark.parametrize(
    "character",
    ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "é", "😀", "\x00"],
    ids=ascii,
)
def test_read_records_reads_texts_with_any_character(tmp_path, character):
    """Also with what Python regards as a line break."""
    record = {"text": f"one{character}two", "answer": "b", "choice": 1}
    example = {"task": "t", "example": 3, "key": "k", "gold": 0, "generation": record}
    write_predictions(tmp_path, [example, example | {"example": 4}])
    assert read_records(tmp_path) == {("generation", 3): record, ("generation", 4): record}
    assert (tmp_path / PREDICTIONS_FILE).read_bytes().count(b"\n") == 2


CORRUPT = [b"{", b"nonsense", b'[["likelihood"]]', b"7", b'["likelihood", 3]', b'{"example": "\xff"}']


@pytest.mark.parametrize("line", CORRUPT, ids=str)
@pytest.mark.parametrize("name", ["part-0-0.jsonl", "part-1-3.jsonl", PREDICTIONS_FILE])
def test_read_records_names_corrupt_line(tmp_path, name, line):
    valid = b'{"example": 0, "task": "t"}' if name == PREDICTIONS_FILE else b'[["likelihood", 0, {}]]'
    (tmp_path / name).write_bytes(valid + b"\n" + line + b"\n" + valid + b"\n")
    with pytest.raises(ConfigError, match=f"{name}, line 2: corrupt"):
        read_records(tmp_path)


def test_write_predictions_and_delete_predictions_leave_other_files(tmp_path):
    names = {PREDICTIONS_FILE, "evaluation.json", "config.yaml", "parts.jsonl"}
    for name in {*names, "part-0-0.jsonl", "part-1-2.jsonl"}:
        (tmp_path / name).write_text("")
    write_predictions(tmp_path, [])
    assert {path.name for path in tmp_path.iterdir()} == names
    delete_predictions(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "parts.jsonl"}


def test_predictions_file_has_no_characters_that_control_a_terminal(tmp_path):
    text = "a\x1b[31m\x9b2J\u202ed\x7f \ud83d"
    record = {"text": text, "answer": None, "choice": None}
    write_predictions(tmp_path, [{"task": "t", "example": 0, "key": "k", "gold": 0, "generation": record}])
    content = (tmp_path / PREDICTIONS_FILE).read_text(encoding="utf-8")
    assert content.removesuffix("\n").isprintable()
    assert read_records(tmp_path) == {("generation", 0): record}
