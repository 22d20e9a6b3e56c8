"""Nulls that Arrow adds to the objects of a column."""

import json

import datasets
import pytest

from gatera_lightning.datamodules.sources.files import read_rows

ROWS = [
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}],
        "x": None,
    },
    {"messages": [{"role": "user", "content": "d", "weight": 0}], "x": 1},
]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_have_the_keys_that_they_were_written_with(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)))
    assert [row for _, row in read_rows(str(path))] == ROWS
