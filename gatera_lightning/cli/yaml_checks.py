"""Refuses YAML that a parser would accept, but that cannot be what its author means, or is not harmless.

The checks read the events of the document, so that nothing is built or expanded before they pass.
"""

from dataclasses import dataclass, field
from typing import Any

import yaml

from gatera_lightning.cli.error_translation import ParseError

_MAX_DEPTH = 50
_MAX_NODES = 100_000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class _Collection:
    """A mapping or a list that is being read."""

    line: int
    is_mapping: bool
    anchor: str | None
    keys: dict[str, int] = field(default_factory=dict)
    """Key -> the line of it."""

    expects_key: bool = True
    nodes: int = 1
    """Values in it, with those of aliases counted wherever they stand."""


def check_document(text: str, origin: str) -> None:
    """Refuse duplicate keys, tags, deep nesting, and aliases that multiply or contain themselves.

    Args:
        text: A YAML document.
        origin: What it was read from, for messages: the name of a file or a flag; may be empty.

    Raises:
        ParseError: With the origin and the line.
    """
    if not any(character in text for character in ":[{&!"):
        return  # one word or number
    check = _Check(origin)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            check.read(event)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark is not None else 0
        reason = " ".join(part for part in (error.context, error.problem) if part)
        hint = ""
        lines = text.splitlines()
        if line < len(lines) and lines[line].lstrip(" ").startswith("\t"):
            hint = "; indent with spaces instead of tabs"
        if origin:
            raise check.error(line, f"this is no YAML ({reason}){hint}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        if origin:
            raise check.error(0, f"this is no YAML ({' '.join(str(error).split())})") from error


class _Check:
    """What has been read of a document so far."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._open: list[_Collection] = []
        self._sizes: dict[str, int | None] = {}
        self._documents = 0

    def error(self, line: int, problem: str) -> ParseError:
        """An error at a line, counted from 0."""
        where = f"{self._origin}, line {line + 1}" if self._origin else f"line {line + 1} of a value"
        return ParseError(f"{where}: {problem}")

    def read(self, event: Any) -> None:
        """Check one event."""
        line = event.start_mark.line
        tag = getattr(event, "tag", None)
        if (tag is not None and not tag.startswith("tag:yaml.org,2002:")) or "python" in (tag or ""):
            raise self.error(line, f"the tag {tag!r} is not accepted; accepted: plain YAML")
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    raise self.error(line, "a second document starts here; accepted: one")
            case yaml.AliasEvent():
                if event.anchor not in self._sizes:
                    raise self.error(line, f"the alias *{event.anchor} refers to nothing before it")
                size = self._sizes[event.anchor]
                if size is None:
                    raise self.error(line, f"the alias *{event.anchor} stands inside of what it refers to")
                self._count(size, line, key=None)
            case yaml.ScalarEvent():
                if event.anchor:
                    self._sizes[event.anchor] = 1
                self._count(1, line, key=event.value)
            case yaml.CollectionStartEvent():
                if len(self._open) >= _MAX_DEPTH:
                    raise self.error(line, f"nested deeper than {_MAX_DEPTH} levels")
                if event.anchor:
                    self._sizes[event.anchor] = None
                self._open.append(_Collection(line, isinstance(event, yaml.MappingStartEvent), event.anchor))
            case yaml.CollectionEndEvent():
                done = self._open.pop()
                if done.anchor:
                    self._sizes[done.anchor] = done.nodes
                self._count(done.nodes, done.line, key=None)

    def _count(self, nodes: int, line: int, key: str | None) -> None:
        """Count values in the innermost open collection, and compare a key with those before it."""
        if not self._open:
            return
        parent = self._open[-1]
        parent.nodes += nodes
        if parent.nodes > _MAX_NODES:
            raise self.error(line, f"more than {_MAX_NODES:,} values, counting those of aliases")
        if not parent.is_mapping:
            return
        if parent.expects_key and key is None:
            raise self.error(line, "a list, a mapping or an alias is no key; accepted: a name")
        if parent.expects_key and key is not None:
            if key in parent.keys:
                first = parent.keys[key] + 1
                raise self.error(line, f"the key {key!r} is given twice, first in line {first}; give it once")
            parent.keys[key] = line
        parent.expects_key = not parent.expects_key
