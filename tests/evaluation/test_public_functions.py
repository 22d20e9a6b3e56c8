"""Public functions of evaluation and gate analysis name an argument of the wrong type."""

import re

import pytest

from gatera_lightning import GateStatistics
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.datamodules.answers.numbers import (
    find_final_number,
    find_option_letter,
    parse_number,
)
from gatera_lightning.datamodules.answers.options import find_keyword, find_option
from gatera_lightning.datamodules.sources.files import read_rows
from gatera_lightning.evaluation.comparison import compare_runs
from gatera_lightning.evaluation.comparison_report import as_json, as_markdown
from gatera_lightning.evaluation.recorded_run import read_run
from gatera_lightning.evaluation.text_metrics import (
    bleu,
    corpus_metrics,
    distinct,
    example_scores,
    rouge_l,
    token_f1,
)
from gatera_lightning.gate_analysis.probing import profile_gates
from gatera_lightning.gate_analysis.report import build_report, render_page

CALLS = {
    "read_run": read_run,
    "compare_runs": compare_runs,
    "compare_runs_of": lambda value: compare_runs([value, value]),
    "as_json": as_json,
    "as_markdown": as_markdown,
    "build_report": lambda value: build_report(value, None, {}),
    "profile_gates": lambda value: profile_gates(value, []),
    "GateStatistics": GateStatistics,
    "parse_number": parse_number,
    "find_final_number": find_final_number,
    "find_option_letter": find_option_letter,
    "find_keyword": lambda value: find_keyword(value, ["a"]),
    "find_option": lambda value: find_option(value, ["a"]),
    "read_rows": read_rows,
    "EvaluationReport": lambda value: EvaluationReport(folder=value if value is not None else 3),
    **{
        f"{metric.__name__}{kind}": lambda value, metric=metric, of=of: metric(of(value), of(value))
        for metric in (token_f1, rouge_l, bleu, example_scores, corpus_metrics)
        for kind, of in {"": lambda value: value, "_of": lambda value: [value]}.items()
    },
    "distinct": lambda value: distinct([value], 1),
}


@pytest.mark.parametrize("value", [None, {}, 5], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_the_wrong_type_are_named(name, value):
    if name == "GateStatistics" and value == 5:
        return
    with pytest.raises(TypeError, match=r"accepted: ") as caught:
        CALLS[name](value)
    assert re.search(r"None|\{\}|3|5", str(caught.value))


def test_page_of_nothing_is_refused():
    with pytest.raises(TypeError, match="render_page: report is None; accepted: a dict"):
        render_page(None)


def test_a_text_is_no_list_of_texts():
    with pytest.raises(TypeError, match="generated is 'abc'; accepted: a list of texts"):
        token_f1("abc", "abx")
