"""Source strings: how ``data.train``, ``data.validation`` and ``data.test`` name the data to read."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_COMPRESSED = ".gz"

ROW_SUFFIXES = (
    *(".jsonl", ".json", ".csv", ".tsv", ".parquet"),
    *(".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz"),
)
"""File name endings of tables, which hold one example per row."""

DATA_SUFFIXES = (*ROW_SUFFIXES, ".txt", ".txt.gz")
"""All file name endings that mark a source as a file."""

# Endings of files that are not read. Others (".5", ".en") may be a part of a hub dataset's name.
_OTHER_SUFFIXES = (
    *(".7z", ".arrow", ".avro", ".bz2", ".db", ".doc", ".docx", ".feather", ".gz", ".h5", ".htm", ".html"),
    *(".log", ".md", ".ndjson", ".npy", ".npz", ".ods", ".orc", ".pdf", ".pickle", ".pkl", ".rar", ".sqlite"),
    *(".sqlite3", ".tar", ".text", ".tgz", ".toml", ".xls", ".xlsx", ".xml", ".xz", ".yaml", ".yml", ".zip"),
    ".zst",
)

# More digits than a list can have elements would not be an index.
_SLICE = re.compile(r"^(?P<location>.*?)(?:\[(?P<start>[0-9]{0,18}):(?P<stop>[0-9]{0,18})\])?$", re.DOTALL)
_HUB = re.compile(r"^(?P<id>[^:@]*)(?::(?P<configuration>[^@]*))?(?:@(?P<split>.*))?$", re.DOTALL)
_SPLIT_NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """A parsed source string: a location, and a slice of the rows there.

    >>> Source.parse("ARC-Easy[100:300]")
    Source(location='ARC-Easy', rows=slice(100, 300, None))
    """

    location: str
    """A task name, file path, URL or hub dataset (see :class:`HubDataset`)."""

    rows: slice
    """The rows to read, counted from 0."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Split a source string into its location and its slice.

        Args:
            text: A location, optionally followed by ``[start:stop]`` with non-negative bounds, either of
                which may be omitted. Anything else in brackets is taken for a part of the location.
        """
        match = _SLICE.match(text)
        assert match is not None  # the pattern matches every string
        start, stop = (int(bound) if bound else None for bound in (match["start"], match["stop"]))
        return cls(match["location"], slice(start, stop))

    def __str__(self) -> str:
        bounds = ("" if bound is None else str(bound) for bound in (self.rows.start, self.rows.stop))
        return self.location + ("" if self.rows == slice(None) else f"[{':'.join(bounds)}]")

    @property
    def selects_nothing(self) -> bool:
        """Whether the slice has no rows, whatever the data has."""
        return self.rows.stop is not None and self.rows.stop <= (self.rows.start or 0)

    def check_size(self, total: int, noun: str = "rows") -> str:
        """Compare the slice with the data.

        Args:
            total: Number of rows that the data has.
            noun: What is counted.

        Returns:
            A remark if the slice goes beyond the data; else an empty string.

        Raises:
            ValueError: The slice selects nothing, or there is nothing.
        """
        if not total:
            raise ValueError(f"{self.location} has no {noun}")
        if total <= (self.rows.start or 0) or self.selects_nothing:
            raise ValueError(f"{str(self)!r} selects no {noun}; {self.location} has {total:,}")
        if self.rows.stop is not None and self.rows.stop > total:
            used = total - (self.rows.start or 0)
            return f"{str(self)!r} goes beyond the {total:,} {noun} of {self.location}; {used:,} are used"
        return ""

    @property
    def name(self) -> str:
        """The name of the source in results and in ``data.weights``.

        This is the task name, the name of a hub dataset without its owner, or the stem of a file. A file
        that is named after a split takes the name of its folder: ``boolq/test.json`` is ``boolq``.
        """
        path = Path(_without_query(self.location))
        if not (suffix := data_suffix(self.location)):
            return path.name if is_url(self.location) else Path(HubDataset.parse(self.location).id).name
        stem = path.name[: -len(suffix)]
        return path.parent.name if stem in _SPLIT_NAMES and path.parent.name else stem


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face hub, written ``owner/name:configuration@split``."""

    id: str
    """``owner/name``."""

    configuration: str | None
    """The configuration to load; None loads the only one."""

    split: str | None
    """The split to load; None loads the one of the same name as the data module's split."""

    @classmethod
    def parse(cls, location: str) -> Self:
        """Split ``owner/name:configuration@split`` into its parts; the last two are optional."""
        match = _HUB.match(location)
        assert match is not None  # the pattern matches every string
        return cls(match["id"], match["configuration"], match["split"])


def duplicate_names(sources: Sequence[str]) -> list[str]:
    """Find sources that results could not distinguish, because they have the same name.

    Args:
        sources: Source strings. Slices of one location may share its name.

    Returns:
        One message per ambiguous name; empty if there is none.
    """
    locations: dict[str, list[str]] = {}
    for source in map(Source.parse, sources):
        locations.setdefault(source.name, []).append(source.location)
    return [
        f"{' and '.join(distinct)} have the same name, {name!r}; accepted: sources with different names"
        for name, found in locations.items()
        if len(distinct := list(dict.fromkeys(found))) > 1
    ]


def data_suffix(location: str) -> str:
    """Return the ending of a file that holds data, in lower case and without a URL's query; empty if none.

    >>> data_suffix("rows.JSONL.gz"), data_suffix("https://host/a.csv?download=true"), data_suffix("a/b")
    ('.jsonl.gz', '.csv', '')
    """
    name = _without_query(location).lower()
    return next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), "")


def is_compressed(location: str) -> bool:
    """Return whether the name of a file says that it is compressed."""
    return _without_query(location).lower().endswith(_COMPRESSED)


def looks_like_path(location: str) -> bool:
    """Return whether a location without a known ending can only be a file or a folder, not a hub dataset."""
    name = HubDataset.parse(location).id
    return (
        os.path.exists(location)
        or name.startswith(("/", ".", "~", "$"))
        or name.count("/") > 1
        or name.lower().endswith(_OTHER_SUFFIXES)
    )


def _without_query(location: str) -> str:
    return location.partition("?")[0].partition("#")[0] if is_url(location) else location


def is_url(path: str) -> bool:
    """Return whether ``path`` is an HTTP(S) address."""
    return path.startswith(("https://", "http://"))


def expand_path(path: str) -> str:
    """Replace ``~`` and ``$VARIABLES`` in a path; unset variables stay as they are."""
    return os.path.expanduser(os.path.expandvars(path))
