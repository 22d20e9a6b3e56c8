"""Equal examples have equal digests, however a table is stored; any other token, range or answer shows."""

import pytest
from datasets import Dataset, concatenate_datasets

from gatera_lightning.datamodules.tokenization import digest
from gatera_lightning.datamodules.tokenization.cache import _COLUMNS
from gatera_lightning.datamodules.tokenization.digest import examples_digest

ROWS = [
    {
        "prompt": list(range(number + 1)),
        "earlier_responses": [[0, 1]] if number % 2 else [],
        "answers": [[5, 6], [7]],
        "lengths": [number + 3, number + 2],
        "characters": [4, 2],
        "labels": ["a", "b"],
        "gold": number % 2,
        "task": "t",
        "example": number,
        "key": f"key {number}",
        "request_key": f"key {number}",
        "group": ("", "first", "second")[number % 3],
        "truncated": False,
    }
    for number in range(7)
]


def table(rows=ROWS):
    return Dataset.from_list(rows, features=_COLUMNS)


def changed(number, **values):
    return [row | values if index == number else row for index, row in enumerate(ROWS)]


def test_storage_does_not_count(monkeypatch):
    expected = examples_digest(table())
    assert len(expected) == 64
    assert examples_digest(concatenate_datasets([table(ROWS[:3]), table(ROWS[3:])])) == expected
    assert examples_digest(table([ROWS[0], *ROWS]).select(range(1, 8))) == expected
    monkeypatch.setattr(digest, "_ROWS", 2)
    assert examples_digest(table()) == expected


def test_names_do_not_count():
    names = [row | {"task": "other", "key": "k", "request_key": "k", "labels": ["x", "y"]} for row in ROWS]
    groups = [row | {"group": row["group"].upper()} for row in names]
    assert examples_digest(table(groups)) == examples_digest(table())


@pytest.mark.parametrize(
    "rows",
    [
        changed(2, prompt=[0, 1, 9]),
        changed(2, prompt=[0, 1]),
        changed(1, earlier_responses=[[0, 2]]),
        changed(1, earlier_responses=[]),
        changed(3, answers=[[5], [6, 7]]),
        changed(3, answers=[[5, 6, 7]]),
        changed(3, characters=[4, 3]),
        changed(3, gold=0),
        changed(0, group="first"),
        [row | {"group": row["group"] or "third"} for row in ROWS],
        ROWS[::-1],
        ROWS[:-1],
    ],
    ids=[
        *("token", "prompt length", "range", "no range", "answer lengths", "answers"),
        *("characters", "gold", "group", "none alone", "order", "fewer"),
    ],
)
def test_every_change_shows(rows):
    assert examples_digest(table(rows)) != examples_digest(table())
