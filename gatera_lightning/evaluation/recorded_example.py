"""One line of ``predictions.jsonl``, checked field by field."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.predictions import KINDS
from gatera_lightning.evaluation.results import MEASURE_LABELS

MEASURES = tuple(MEASURE_LABELS.values())
"""Labels of the measures by which an example can be correct."""

_SCORES = {score: label for score, label in MEASURE_LABELS.items() if score != "generation"}


@dataclass(frozen=True)
class RecordedExample:
    """One example as one run answered it.

    Attributes:
        line: Line number in ``predictions.jsonl``.
        task: Name of the task.
        example: Index of the example within its split.
        key: Hash of the question's content, the same in every run.
        gold: Index of the correct candidate.
        kinds: How the example was evaluated: ``likelihood``, ``generation`` or both.
        choices: Index of the chosen candidate by measure, for measures that can judge the example; None where
            the generated text has no answer.
        gold_nll: Negative log-likelihood of the correct answer, in nats; None without likelihoods.
        gold_tokens: Number of tokens of the correct answer; None without likelihoods.
        text: The generated text and its reference; None where a text is right or wrong.
        scores: Metrics of the generated text against its reference.
    """

    line: int
    task: str
    example: int
    key: str
    gold: int
    kinds: tuple[str, ...]
    choices: Mapping[str, int | None]
    gold_nll: float | None
    gold_tokens: int | None
    text: tuple[str, str] | None
    scores: Mapping[str, float]

    def is_correct(self, measure: str) -> bool:
        """Whether the measure chooses the correct candidate; a text without an answer is wrong."""
        return self.choices[measure] == self.gold


def parse_example(line: bytes, number: int, where: str) -> RecordedExample:
    """Parse and check a line of ``predictions.jsonl``.

    Args:
        line: The line.
        number: Its line number.
        where: File and line, for errors.

    Raises:
        ConfigError: A field is missing or not valid; the message names the field and what is expected.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also for bytes that are not UTF-8
        raise ConfigError(f"{where}: is not JSON ({error}); expected one object per line") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: is {shortened(fields)}; expected an object")
    task = _get(fields, "task", where, "a string", _is_text)
    example = _get(fields, "example", where, "an integer of at least 0", _is_index)
    key = _get(fields, "key", where, "a non-empty string", lambda value: _is_text(value) and value != "")
    gold = _get(fields, "gold", where, "an integer of at least 0", _is_index)
    choices: dict[str, int | None] = {}
    scores: dict[str, float] = {}
    gold_nll = gold_tokens = text = None
    if "likelihood" in fields:
        chosen, gold_nll, gold_tokens = _parse_likelihood(fields, gold, where)
        choices |= chosen
    if "generation" in fields:
        chosen, text, scores = _parse_generation(fields, where)
        choices |= chosen
    kinds = tuple(kind for kind in KINDS if kind in fields)
    if not kinds:
        raise ConfigError(f"{where}: has neither likelihood nor generation; expected at least one")
    return RecordedExample(
        number, task, example, key, gold, kinds, choices, gold_nll, gold_tokens, text, scores
    )


def check_record(kind: str, record: Any, where: str) -> None:
    """Check what an evaluation stored about one example, before it is used again.

    Args:
        kind: ``likelihood`` or ``generation``.
        record: The record; a text with a reference may not have its scores yet.
        where: File or folder, for errors.

    Raises:
        ConfigError: A field is missing or not valid.
    """
    if kind == "likelihood":
        _parse_likelihood({kind: record}, 0, where)
    elif isinstance(record, dict) and "reference" in record:
        _parse_generation({kind: {"scores": {}} | record}, where)
    else:
        _parse_generation({kind: record}, where)
        _get(record, "answer", f"{where}, {kind}", "a string, or null", lambda v: v is None or _is_text(v))


def _parse_likelihood(
    fields: Mapping[str, Any], gold: int, where: str
) -> tuple[dict[str, int | None], float, int]:
    """Choices by measure, and the negative log-likelihood and the tokens of the correct answer."""
    likelihood = _get(fields, "likelihood", where, "an object", _is_object)
    inside = f"{where}, likelihood"
    log_p = _get(likelihood, "log_likelihoods", inside, "a list of finite numbers", _is_list_of(_is_finite))
    n = len(log_p)
    counts = f"{n} integers of at least 0, one per candidate"
    tokens, _ = (
        _get(likelihood, name, inside, counts, _is_list_of(_is_index, n)) for name in ("tokens", "characters")
    )
    if gold >= n:
        raise ConfigError(f"{where}: gold is {gold}; expected one of the {n} candidates, 0 to {n - 1}")
    choice = _get(likelihood, "choice", inside, "an object", _is_object)
    choices: dict[str, int | None] = {}
    for score, measure in _SCORES.items():
        chosen = _get(
            choice,
            score,
            f"{inside}, choice",
            f"a candidate, 0 to {n - 1}",
            lambda value: _is_index(value) and value < n,
        )
        if n > 1:  # a single candidate always ranks first
            choices[measure] = chosen
    return choices, -float(log_p[gold]), tokens[gold]


def _parse_generation(
    fields: Mapping[str, Any], where: str
) -> tuple[dict[str, int | None], tuple[str, str] | None, dict[str, float]]:
    """Choices by measure; or the text with its reference, and its scores."""
    generation = _get(fields, "generation", where, "an object", _is_object)
    inside = f"{where}, generation"
    text = _get(generation, "text", inside, "a string", _is_text)
    if "reference" not in generation:
        expected = "an integer of at least 0, or null"
        choice = _get(generation, "choice", inside, expected, lambda value: value is None or _is_index(value))
        return {MEASURE_LABELS["generation"]: choice}, None, {}
    reference = _get(generation, "reference", inside, "a string", _is_text)
    scores = _get(generation, "scores", inside, "finite numbers by metric", _are_scores)
    return {}, (text, reference), scores


def _get(
    fields: Mapping[str, Any], name: str, where: str, expected: str, valid: Callable[[Any], bool]
) -> Any:
    if name not in fields:
        raise ConfigError(f"{where}: {name!r} is missing; expected {expected}")
    if not valid(fields[name]):
        raise ConfigError(f"{where}: {name} is {shortened(fields[name])}; expected {expected}")
    return fields[name]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_index(value: object) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):  # bool is a subclass of int
        return False
    return 0 <= value <= 2**53  # beyond it, sums would not be exact


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _are_scores(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_finite, value.values()))


def _is_list_of(valid: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def check(value: object) -> bool:
        return (
            isinstance(value, list)
            and len(value) > 0
            and (length is None or len(value) == length)
            and all(map(valid, value))
        )

    return check
