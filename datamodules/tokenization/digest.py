"""A digest of the examples of a split: equal contents have equal digests, wherever their files are."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

_COLUMNS = ("prompt", "earlier_responses", "answers", "characters", "gold")
_ROWS = 10_000  # read at a time


def examples_digest(table: Dataset) -> str:
    """Return the SHA-256, in hex digits, of what a model learns from or is validated on, in order.

    It covers token ids, their supervised ranges and correct answers, and neither names nor places of files.
    Arrow buffers are hashed without making Python objects, so 170,000 examples take less than a second.
    Groups count only by which examples share one.

    Args:
        table: A token table, from :func:`~gatera_lightning.datamodules.tokenization.cache.tokenize_split`. A
            selection of rows is a hundred times slower.
    """
    streams: dict[tuple[str, int], Any] = {}
    for batch in table.select_columns(list(_COLUMNS)).with_format("arrow").iter(_ROWS):
        for name in _COLUMNS:
            for chunk in batch[name].chunks:
                for level, values in enumerate(_levels(chunk)):
                    streams.setdefault((name, level), hashlib.sha256()).update(values)
    names = table.select_columns(["group"]).with_format("arrow")[:]["group"].combine_chunks()
    groups = pc.dictionary_encode(names)  # numbered as they first occur
    without = pc.equal(groups.dictionary, "").cast(pa.int8())  # examples without a group are independent
    streams["group", 0] = hashlib.sha256(_integers(groups.indices) + _integers(without))
    parts = [[*place, stream.hexdigest()] for place, stream in sorted(streams.items())]
    return hashlib.sha256(json.dumps([len(table), parts]).encode()).hexdigest()


def _levels(array: pa.Array) -> Iterator[bytes]:
    """The lengths of nested lists, from the outside in, and then their integers."""
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        yield _integers(pc.list_value_length(array))
        array = array.flatten()
    yield _integers(array)


def _integers(array: pa.Array) -> bytes:
    values: np.ndarray[Any, Any] = array.fill_null(-1).to_numpy(zero_copy_only=False)
    return values.astype("<i8").tobytes()
