"""A finished evaluation, read from its folder: the predictions, the method, and the evaluation settings."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gatera_lightning.errors import ConfigError, checks_arguments, printable
from gatera_lightning.evaluation.identity import IDENTITY_FILE
from gatera_lightning.evaluation.json_objects import read_object
from gatera_lightning.evaluation.prediction_files import PREDICTIONS_FILE
from gatera_lightning.evaluation.recorded_example import MEASURES, RecordedExample, parse_example
from gatera_lightning.evaluation.results import SUMMARY_FILE

_COMPARED_SETTINGS = ("adapter", "method")
"""Parts of the identity in which runs are meant to differ."""


@dataclass(frozen=True)
class RecordedRun:
    """The examples of one ``predictions.jsonl``.

    Attributes:
        path: The file.
        method: ``update × gate``, or ``untrained``; None where the folder does not say.
        settings: How the run was evaluated (data, backbone, dtype, decoding): name -> value as JSON. Empty
            where the folder does not say.
        examples: The examples, sorted by task and index.
    """

    path: Path
    method: str | None
    settings: Mapping[str, str]
    examples: tuple[RecordedExample, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """How the examples were evaluated: ``likelihood``, ``generation`` or both."""
        return self.examples[0].kinds

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """The measures that can judge at least one of the examples."""
        return tuple(
            measure for measure in MEASURES if any(measure in found.choices for found in self.examples)
        )

    @property
    def text_metrics(self) -> tuple[str, ...]:
        """The metrics of generated text that every example has."""
        return tuple(self.examples[0].scores)

    @cached_property
    def by_question(self) -> dict[tuple[str, str, int], RecordedExample]:
        """Examples by (task, key, earlier occurrences of the key in the task): a question may occur twice."""
        found: dict[tuple[str, str, int], RecordedExample] = {}
        occurrences: dict[tuple[str, str], int] = {}
        for example in self.examples:
            earlier = occurrences.get((example.task, example.key), 0)
            occurrences[example.task, example.key] = earlier + 1
            found[example.task, example.key, earlier] = example
        return found


@checks_arguments
def read_run(path: str | Path) -> RecordedRun:
    """Read a finished evaluation.

    Args:
        path: Its folder, or a predictions file. Without the folder's other files, the method and the settings
            of a run are unknown.

    Raises:
        ConfigError: There are no predictions, or a line is not as ``test`` writes it; the message names the
            file, the line and the field.
    """
    path = Path(path)
    file = path / PREDICTIONS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(_missing_predictions(path))
    examples = _read_examples(file)
    return RecordedRun(file, _method(file), _settings(file), examples)


def joined_kinds(kinds: Sequence[str]) -> str:
    """``likelihood only``, or ``likelihood and generation``."""
    return " and ".join(kinds) + (" only" if len(kinds) == 1 else "")


def _read_examples(file: Path) -> tuple[RecordedExample, ...]:
    """The examples of a predictions file, by task and index; all must be evaluated by the same kinds."""
    examples: dict[tuple[str, int], RecordedExample] = {}
    first: RecordedExample | None = None
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(printable(f"{file}: cannot be read ({error.strerror})")) from None
    with io.BytesIO(content) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            found = parse_example(line, number, where)
            place = (found.task, found.example)
            if (same := examples.get(place)) is not None:
                raise ConfigError(
                    f"{where}: task {found.task!r}, example {found.example} is already in line {same.line}; "
                    "expected one line per example"
                )
            first = first or found
            if found.kinds != first.kinds:
                raise ConfigError(
                    f"{where}: has {joined_kinds(found.kinds)}; expected {joined_kinds(first.kinds)} as in "
                    "line 1. If the evaluation was limited or stopped, run test again with this folder and "
                    "without a limit"
                )
            if tuple(found.scores) != tuple(first.scores):
                raise ConfigError(
                    f"{where}: its text has the scores {_joined_names(found.scores)}; "
                    f"expected {_joined_names(first.scores)} as in line 1"
                )
            examples[place] = found
    if not examples:
        raise ConfigError(f"{file}: is empty; expected one line per example")
    return tuple(examples[place] for place in sorted(examples))


def _joined_names(scores: Mapping[str, float]) -> str:
    return ", ".join(scores) or "none"


def _missing_predictions(path: Path) -> str:
    """Why there are no predictions at a path, and which folders below it have some."""
    if not path.is_dir():
        return f"{path}: no such file or folder; expected a run's folder or its {PREDICTIONS_FILE}"
    below = sorted(str(found.parent) for found in path.rglob(PREDICTIONS_FILE))
    if not below:
        return f"{path}: has no {PREDICTIONS_FILE}, which `test` writes, nor has any folder below it"
    some = ", ".join(below[:10]) + (f" and {len(below) - 10} more" if len(below) > 10 else "")
    return f"{path}: has no {PREDICTIONS_FILE}, which `test` writes; these have: {some}"


def _method(predictions: Path) -> str | None:
    """``update × gate``, or ``untrained``, from the summary beside the predictions; None without it."""
    model = _read_neighbor(predictions, SUMMARY_FILE).get("model")
    if not isinstance(model, dict):
        return None
    if model.get("adapter_from") == "untrained":
        return "untrained"
    adapter = model.get("adapter")
    if not isinstance(adapter, dict):
        return None
    update, gate = adapter.get("update"), adapter.get("gate")
    return f"{update} × {gate}" if isinstance(update, str) and isinstance(gate, str) else None


def _settings(predictions: Path) -> dict[str, str]:
    """The identity beside the predictions, without method and adapter: ``name`` or ``name.part`` -> JSON."""
    settings: dict[str, str] = {}
    for name, value in _read_neighbor(predictions, IDENTITY_FILE).items():
        if name in _COMPARED_SETTINGS:
            continue
        parts = (
            {f"{name}.{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
        )
        settings |= {part: json.dumps(v) for part, v in parts.items()}
    return settings


def _read_neighbor(predictions: Path, name: str) -> dict[str, Any]:
    """A JSON object beside the predictions; empty if there is none, or if the predictions were renamed."""
    if predictions.name != PREDICTIONS_FILE:
        return {}
    return read_object(predictions.with_name(name)) or {}
