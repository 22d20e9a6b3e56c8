"""Source strings: how ``data.train``, ``data.validation`` and ``data.test`` name the data to read."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""File name endings of tables, which hold one example per row."""

DATA_SUFFIXES = (*ROW_SUFFIXES, ".txt")
"""All file name endings that mark a source as a file."""

_SLICE = re.compile(r"^(?P<location>.*?)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?$")
_HUB = re.compile(r"^(?P<id>[^:@]*)(?::(?P<configuration>[^@]*))?(?:@(?P<split>.*))?$")
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

    @property
    def name(self) -> str:
        """The name of the source in results and in ``data.weights``.

        This is the task name, the name of a hub dataset without its owner, or the stem of a file. A file
        that is named after a split takes the name of its folder: ``boolq/test.json`` is ``boolq``.
        """
        path = Path(self.location)
        if path.suffix.lower() not in DATA_SUFFIXES:
            return path.name if is_url(self.location) else Path(HubDataset.parse(self.location).id).name
        return path.parent.name if path.stem in _SPLIT_NAMES and path.parent.name else path.stem


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


def is_url(path: str) -> bool:
    """Return whether ``path`` is an HTTP(S) address."""
    return path.startswith(("https://", "http://"))


def expand_path(path: str) -> str:
    """Replace ``~`` and ``$VARIABLES`` in a path; unset variables stay as they are."""
    return os.path.expanduser(os.path.expandvars(path))
