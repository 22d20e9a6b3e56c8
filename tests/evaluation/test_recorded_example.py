"""Parsing of a line of ``predictions.jsonl``: every field is checked, and errors name line and field."""

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_runs import example_line, solution_line, text_line, without

from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.comparison import compare_runs
from gatera_lightning.evaluation.comparison_report import as_json
from gatera_lightning.evaluation.recorded_example import MEASURES, parse_example
from gatera_lightning.evaluation.recorded_run import RecordedRun, read_run

SUMMED, PER_TOKEN, PER_CHARACTER, GENERATED = MEASURES


def parse(fields):
    return parse_example(json.dumps(fields).encode(), 1, "line 1")


def test_parse_example_reads_choices_and_gold_likelihood():
    found = parse(example_line("arc", 7, "k", choice=(1, 0, 2), nll=2.5, tokens=4, generated=None))
    assert (found.task, found.example, found.key, found.gold) == ("arc", 7, "k", 1)
    assert found.kinds == ("likelihood", "generation")
    assert found.choices == {SUMMED: 1, PER_TOKEN: 0, PER_CHARACTER: 2, GENERATED: None}
    assert (found.gold_nll, found.gold_tokens) == (2.5, 4)
    assert (found.text, found.scores) == (None, {})
    assert [found.is_correct(measure) for measure in MEASURES] == [True, False, False, False]


def test_parse_example_reads_text_with_reference():
    found = parse(text_line(0, "yes", "no", token_f1=0.25))
    assert (found.text, found.scores) == (("yes", "no"), {"token_f1": 0.25})
    assert (found.choices, found.gold_nll, found.gold_tokens) == ({}, None, None)


def test_parse_example_has_no_choice_among_single_candidate():
    found = parse(solution_line(0, 2.0))
    assert (found.choices, found.gold_nll, found.gold_tokens) == ({}, 2.0, 3)


def changed(path, value):
    """A valid line with another value for the field at ``path``."""
    fields = example_line(generated=1)
    *outer, last = path.split(".")
    place = fields
    for name in outer:
        place = place[name]
    place[last] = value
    return fields


INVALID = {
    "not JSON": ("{", "is not JSON"),
    "empty line": ("", "is not JSON"),
    "list": ("[1]", "expected an object"),
    "no task": (without("task", example_line()), "'task' is missing; expected a string"),
    "no key": (without("key", example_line()), "'key' is missing"),
    "empty key": (changed("key", ""), "key is ''; expected a non-empty string"),
    "no gold": (without("gold", example_line()), "'gold' is missing"),
    "huge example": (changed("example", 2**70), "expected an integer of at least 0"),
    "huge number of tokens": (changed("likelihood.tokens", [1, 10**400, 1]), "expected 3 integers"),
    "string for example": (changed("example", "7"), "example is '7'; expected an integer of at least 0"),
    "bool for gold": (changed("gold", True), "gold is True"),
    "negative gold": (changed("gold", -1), "gold is -1"),
    "gold too large": (changed("gold", 3), "gold is 3; expected one of the 3 candidates, 0 to 2"),
    "no kind": (without("likelihood", example_line()), "has neither likelihood nor generation"),
    "likelihood null": (changed("likelihood", None), "likelihood is None; expected an object"),
    "two counts": (changed("likelihood.tokens", [1, 2]), "tokens is [1, 2]; expected 3 integers"),
    "fractional count": (changed("likelihood.characters", [1, 2, 2.5]), "characters is [1, 2, 2.5]"),
    "NaN": (
        changed("likelihood.log_likelihoods", [-1.0, math.nan, 0]),
        "log_likelihoods is [-1.0, nan, 0]; expected a list of finite",
    ),
    "infinity": (
        changed("likelihood.log_likelihoods", [-1.0, -math.inf, 0]),
        "expected a list of finite numbers",
    ),
    "beyond float": (
        changed("likelihood.log_likelihoods", [-1.0, 10**400, 0]),
        "expected a list of finite numbers",
    ),
    "no candidates": (changed("likelihood.log_likelihoods", []), "log_likelihoods is []"),
    "no choice": (
        changed("likelihood.choice", {"sum": 1}),
        "likelihood, choice: 'per_token' is missing; expected a candidate, 0 to 2",
    ),
    "choice too large": (changed("likelihood.choice.sum", 3), "sum is 3; expected a candidate, 0 to 2"),
    "choice null": (changed("likelihood.choice.per_character", None), "per_character is None"),
    "text null": (changed("generation.text", None), "generation: text is None; expected a string"),
    "string for choice": (
        changed("generation.choice", "a"),
        "generation: choice is 'a'; expected an integer of at least 0, or null",
    ),
    "example again": (example_line(example=7, generated=1), "task 'arc', example 7 is already in line 1"),
    "fewer kinds": (example_line(), "has likelihood only; expected likelihood and generation as in line 1"),
    "other kind": (
        without("likelihood", example_line(generated=1)),
        "has generation only; expected likelihood and generation",
    ),
}


@pytest.mark.parametrize(("line", "message"), INVALID.values(), ids=INVALID)
def test_read_run_names_invalid_line_and_field(write, line, message):
    folder = write("run", [example_line(example=7, generated=1), line])
    with pytest.raises(ConfigError) as caught:
        read_run(folder)
    assert f"{folder / 'predictions.jsonl'}, line 2" in str(caught.value)
    assert message in str(caught.value)


INVALID_TEXTS = {
    "text": ({"text": 3}, "generation: text is 3; expected a string"),
    "reference null": ({"reference": None}, "generation: reference is None; expected a string"),
    "scores null": ({"scores": None}, "generation: scores is None; expected finite numbers by metric"),
    "list of scores": ({"scores": [0.5]}, "generation: scores is [0.5]; expected finite numbers"),
    "string for score": ({"scores": {"token_f1": "0.5"}}, "generation: scores is {'token_f1': '0.5'}"),
    "bool for score": ({"scores": {"token_f1": True}}, "generation: scores is {'token_f1': True}"),
    "NaN": ({"scores": {"token_f1": math.nan}}, "scores is {'token_f1': nan}; expected finite numbers"),
    "infinity": ({"scores": {"token_f1": math.inf}}, "scores is {'token_f1': inf}; expected finite numbers"),
    "fewer scores": ({"scores": {}}, "its text has the scores none; expected token_f1 as in line 1"),
    "more scores": (
        {"scores": {"token_f1": 0.5, "meteor": 0.5}},
        "its text has the scores token_f1, meteor; expected token_f1 as in line 1",
    ),
}


@pytest.mark.parametrize(("fields", "message"), INVALID_TEXTS.values(), ids=INVALID_TEXTS)
def test_read_run_names_invalid_text(write, fields, message):
    invalid = text_line(8)
    invalid["generation"] |= fields
    folder = write("run", [text_line(7), invalid])
    with pytest.raises(ConfigError) as caught:
        read_run(folder)
    assert f"{folder / 'predictions.jsonl'}, line 2" in str(caught.value)
    assert message in str(caught.value)


def test_read_run_rejects_text_without_scores(write):
    """As a part file holds it."""
    fields = text_line(7)
    del fields["generation"]["scores"]
    with pytest.raises(ConfigError, match="line 1, generation: 'scores' is missing; expected finite numbers"):
        read_run(write("run", [fields]))


def test_read_run_rejects_answers_mixed_with_texts(write):
    answer = without("likelihood", example_line(example=8, generated=1))
    message = "line 2: its text has the scores none; expected token_f1 as in line 1"
    with pytest.raises(ConfigError, match=message):
        read_run(write("a", [text_line(7), answer]))
    message = "line 2: its text has the scores token_f1; expected none as in line 1"
    with pytest.raises(ConfigError, match=message):
        read_run(write("b", [answer, text_line(9)]))


def test_read_run_rejects_invalid_utf8(write):
    folder = write("run", [example_line()])
    (folder / "predictions.jsonl").write_bytes(b'{"task": "\xff"}\n')
    with pytest.raises(ConfigError, match="line 1: is not JSON"):
        read_run(folder)


def test_read_run_accepts_unicode_line_separators_in_text(write):
    fields = example_line(generated=1, text="a\u2028b\x85c\rd")
    assert len(read_run(write("run", [json.dumps(fields, ensure_ascii=False)])).examples) == 1


ODD = [None, True, -1, 1e308, math.nan, 10**400, "", "x", [], {}, [[1]], {"a": 1}, "\ud800", 0, 2**70]


def places(value, path=()):
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, found in inner for place in places(found, (*path, key))]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_line_is_an_example_or_an_error(data):
    """One value of a valid line is replaced; what is accepted can be compared and written."""
    fields = json.loads(json.dumps(data.draw(st.sampled_from([example_line(generated=1), text_line(0)]))))
    *outer, last = data.draw(st.sampled_from(places(fields)))
    place = fields
    for name in outer:
        place = place[name]
    place[last] = data.draw(st.sampled_from(ODD))
    try:
        example = parse(fields)
    except ConfigError as error:
        assert str(error).startswith("line 1")  # noqa: PT017
        return
    runs = [RecordedRun(Path(name), None, {}, (example,)) for name in "ab"]
    with suppress(ConfigError):  # a text without scores has nothing to compare
        json.loads(as_json(compare_runs(runs)))
