"""What ``test`` left of a run: ``predictions.jsonl``, read strictly, and beside it the method's name and how it evaluated."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.predictions import IDENTITY
from gatera_lightning.evaluation.predictions import MERGED as PREDICTIONS
from gatera_lightning.evaluation.results import LABELS, SUMMARY

_SCORES = {score: label for score, label in LABELS.items() if score != "generation"}
MEASURES = tuple(LABELS.values())
_COMPARED = ("adapter", "method")  # what two runs are compared for


@dataclass(frozen=True)
class Row:
    """One question as one run answered it."""

    line: int
    task: str
    example: int
    key: str
    gold: int
    kinds: tuple[str, ...]
    """How the row was evaluated: likelihood, generation, or both."""
    choices: Mapping[str, int | None]
    """The answer chosen by each measure that can judge the row; None where a generated text holds no answer."""
    nats: float | None
    """Of the right answer; None without likelihoods."""
    tokens: int | None
    text: tuple[str, str] | None
    """What was generated, and its reference; None where a text is judged right or wrong."""
    scores: Mapping[str, float]
    """Metrics of the text against its reference."""

    def right(self, measure: str) -> bool:
        """Whether the measure's choice is the gold answer; no answer is a wrong one."""
        return self.choices[measure] == self.gold


@dataclass(frozen=True)
class RecordedRun:
    """The rows of one ``predictions.jsonl``, by task and example."""

    path: Path
    method: str | None
    settings: Mapping[str, str]
    """How it was evaluated, as JSON by setting: data, backbone, dtype, decoding; empty where that is not recorded."""
    rows: tuple[Row, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """How every row was evaluated."""
        return self.rows[0].kinds

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """The measures that judge some of the rows: a single candidate always ranks first, and is none."""
        return tuple(measure for measure in MEASURES if any(measure in row.choices for row in self.rows))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of text that every row has."""
        return tuple(self.rows[0].scores)

    @cached_property
    def by_question(self) -> dict[tuple[str, str, int], Row]:
        """Rows by (task, key, how many times the key came before in the task): a question may be asked twice."""
        found: dict[tuple[str, str, int], Row] = {}
        seen: dict[tuple[str, str], int] = {}
        for row in self.rows:
            nth = seen.get((row.task, row.key), 0)
            seen[row.task, row.key] = nth + 1
            found[row.task, row.key, nth] = row
        return found


def read_run(path: Path) -> RecordedRun:
    """Read a run's folder, or its predictions file; ConfigError naming file, line and field for whatever is not as written."""
    file = path / PREDICTIONS if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(_nothing_at(path))
    rows: dict[tuple[str, int], Row] = {}
    first: Row | None = None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            row = _row(number, line, where)
            if (same := rows.get((row.task, row.example))) is not None:
                raise ConfigError(
                    f"{where}: task {row.task!r}, example {row.example} is line {same.line} already"
                )
            first = first or row
            if row.kinds != first.kinds:
                raise ConfigError(
                    f"{where}: has {named(row.kinds)}; expected {named(first.kinds)} as in line 1. "
                    "Was the evaluation limited, or stopped? Run test again into this folder, without a limit"
                )
            if tuple(row.scores) != tuple(first.scores):
                raise ConfigError(
                    f"{where}: its text has the scores {listed(row.scores)}; expected {listed(first.scores)} as in line 1"
                )
            rows[row.task, row.example] = row
    if not rows:
        raise ConfigError(f"{file}: is empty; expected one line per example")
    return RecordedRun(file, _method(file), _settings(file), tuple(rows[place] for place in sorted(rows)))


def labels(runs: Sequence[RecordedRun]) -> list[str]:
    """A distinct name for every run: its method, its folder, or as much of its path as tells it from the others."""
    # A predictions file under another name is its own run: the folder may hold several.
    places = [
        path.parent if path.name == PREDICTIONS else path for path in (run.path.resolve() for run in runs)
    ]
    names = [run.method or place.name for run, place in zip(runs, places, strict=True)]
    if len(set(names)) == len(names):
        return names
    longest = max(len(place.parts) for place in places)
    length = next(
        n for n in range(1, longest + 1) if len({place.parts[-n:] for place in places}) == len(places)
    )
    short = [Path(*place.parts[-length:]).as_posix() for place in places]
    return [
        name if names.count(name) == 1 else f"{name} ({tail})" if run.method else tail
        for run, name, tail in zip(runs, names, short, strict=True)
    ]


def _nothing_at(path: Path) -> str:
    if not path.is_dir():
        return f"{path}: no such file or folder; expected a run's folder or its {PREDICTIONS}"
    below = sorted(str(found.parent) for found in path.rglob(PREDICTIONS))
    if not below:
        return f"{path}: has no {PREDICTIONS}, which `test` writes, nor has any folder below"
    listed = ", ".join(below[:10]) + (f" and {len(below) - 10} more" if len(below) > 10 else "")
    return f"{path}: has no {PREDICTIONS}, which `test` writes; these have: {listed}"


def named(kinds: Sequence[str]) -> str:
    """``likelihood only``, or ``likelihood and generation``."""
    return " and ".join(kinds) + (" only" if len(kinds) == 1 else "")


def listed(scores: Mapping[str, float]) -> str:
    """The names of scores in words."""
    return ", ".join(scores) or "none"


def _row(number: int, line: bytes, where: str) -> Row:
    try:
        fields = json.loads(line)
    except ValueError as error:  # also bytes that are not UTF-8
        raise ConfigError(f"{where}: is not JSON ({error}); expected one object per line") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: is {shortened(fields)}; expected an object")
    task = _get(fields, "task", where, "a text", lambda v: isinstance(v, str))
    example = _get(fields, "example", where, "a whole number from 0", _is_index)
    key = _get(fields, "key", where, "a text that is not empty", lambda v: isinstance(v, str) and v != "")
    gold = _get(fields, "gold", where, "a whole number from 0", _is_index)
    choices: dict[str, int | None] = {}
    scores: dict[str, float] = {}
    nats = tokens = text = None
    if "likelihood" in fields:
        likelihood = _get(fields, "likelihood", where, "an object", lambda v: isinstance(v, dict))
        inside = f"{where}, likelihood"
        log_p = _get(likelihood, "log_likelihoods", inside, "a list of finite numbers", _all(_is_finite))
        n = len(log_p)
        counts = {
            name: _get(
                likelihood, name, inside, f"{n} whole numbers from 0, one a candidate", _all(_is_index, n)
            )
            for name in ("tokens", "characters")
        }
        if gold >= n:
            raise ConfigError(f"{where}: gold is {gold}; expected one of the {n} candidates, 0 to {n - 1}")
        choice = _get(likelihood, "choice", inside, "an object", lambda v: isinstance(v, dict))
        for score, measure in _SCORES.items():
            chosen = _get(
                choice,
                score,
                f"{inside}, choice",
                f"a candidate, 0 to {n - 1}",
                lambda v: _is_index(v) and v < n,
            )
            if n > 1:
                choices[measure] = chosen
        nats, tokens = -float(log_p[gold]), counts["tokens"][gold]
    if "generation" in fields:
        generation = _get(fields, "generation", where, "an object", lambda v: isinstance(v, dict))
        inside = f"{where}, generation"
        _get(generation, "text", inside, "a text", lambda v: isinstance(v, str))
        if "reference" in generation:
            text = (
                generation["text"],
                _get(generation, "reference", inside, "a text", lambda v: isinstance(v, str)),
            )
            scores = _get(generation, "scores", inside, "finite numbers by the metric's name", _are_numbers)
        else:
            choices["generation"] = _get(
                generation,
                "choice",
                inside,
                "a whole number from 0, or null",
                lambda v: v is None or _is_index(v),
            )
    kinds = tuple(kind for kind in ("likelihood", "generation") if kind in fields)
    if not kinds:
        raise ConfigError(f"{where}: has neither likelihood nor generation; expected at least one")
    return Row(number, task, example, key, gold, kinds, choices, nats, tokens, text, scores)


def _get(
    fields: Mapping[str, Any], name: str, where: str, expected: str, valid: Callable[[Any], bool]
) -> Any:
    if name not in fields:
        raise ConfigError(f"{where}: misses {name!r}; expected {expected}")
    if not valid(fields[name]):
        raise ConfigError(f"{where}: {name} is {shortened(fields[name])}; expected {expected}")
    return fields[name]


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0  # True is an int to Python


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_finite, value.values()))


def _all(valid: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda v: (
        isinstance(v, list) and len(v) == (length or len(v)) and len(v) > 0 and all(map(valid, v))
    )


def _method(predictions: Path) -> str | None:
    """``update × gate``, or ``untrained``, as the summary beside the predictions has it; None without it."""
    model = _beside(predictions, SUMMARY).get("model")
    if isinstance(model, dict) and model.get("adapter_from") == "untrained":
        return "untrained"
    found = model.get("adapter") if isinstance(model, dict) else None
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name), str) for name in ("update", "gate")
    ):
        return None
    return f"{found['update']} × {found['gate']}"


def _settings(predictions: Path) -> dict[str, str]:
    settings: dict[str, str] = {}
    for name, value in _beside(predictions, IDENTITY).items():
        parts = (
            {f"{name}.{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
        )
        settings |= {} if name in _COMPARED else {part: json.dumps(v) for part, v in parts.items()}
    return settings


def _beside(predictions: Path, name: str) -> dict[str, Any]:
    """An object that ``test`` wrote beside its predictions; empty where it did not, or where the predictions were renamed."""
    file = predictions.with_name(name)
    if predictions.name != PREDICTIONS or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file}: is not JSON ({error})") from None
    return found if isinstance(found, dict) else {}
