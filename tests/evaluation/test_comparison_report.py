"""Reports of a comparison: every table of the Markdown, and the same figures in the JSON."""

import json

import pytest
from recorded_runs import example_line, random_text_lines, solution_line

from gatera_lightning.evaluation.comparison import compare_runs
from gatera_lightning.evaluation.comparison_report import as_json, as_markdown
from gatera_lightning.evaluation.intervals import Proportion
from gatera_lightning.evaluation.paired_tests import PairedOutcomes
from gatera_lightning.evaluation.recorded_example import MEASURES
from gatera_lightning.evaluation.recorded_run import read_run

SUMMED = MEASURES[0]
LOSS_SECTION = "## Cross-entropy loss of the correct answers (nats per token)"
TEXT_SECTION = "## Generated texts compared with their references"


@pytest.fixture
def comparison(write):
    """Two runs on two tasks, and one on more examples of one of them."""
    tasks = ("arc", "b|q")
    first = [
        example_line(task, i, choice=int(i < 20), nll=1 + i % 5, generated=1)
        for task in tasks
        for i in range(40)
    ]
    second = [
        example_line(task, i, choice=int(i < 32), nll=1 + i % 5, generated=None)
        for task in tasks
        for i in range(40)
    ]
    third = [example_line("arc", i) for i in range(50)]
    methods = (("hira", "none"), ("hira", "token"), ("lora", "none"))
    runs = []
    for name, lines, (update, gate) in zip("abc", (first, second, third), methods, strict=True):
        runs.append(read_run(write(name, lines, {"update": update, "gate": gate})))
    return compare_runs(runs)


def test_as_markdown_has_accuracies_differences_and_losses(comparison):
    text = as_markdown(comparison)
    assert text.startswith("# Comparison of 3 runs with the baseline hira × none\n")
    accuracy = str(Proportion(20, 40)), str(Proportion(32, 40)), str(Proportion(50, 50))
    assert f"| {SUMMED} | arc | 40 / 40 / 50 | {accuracy[0]} | {accuracy[1]} | {accuracy[2]} |" in text
    assert f"| {SUMMED} | b\\|q | 40 | {accuracy[0]} | {accuracy[1]} | – |" in text
    assert "| generation | average of 2 tasks |  | 1.000 [0.938, 1.000] | 0.000 [0.000, 0.062] | – |" in text
    low, high = PairedOutcomes(20, 0, 12, 8).interval
    difference = f"+0.300 [{low:+.3f}, {high:+.3f}]"
    assert f"| {SUMMED} | arc | {difference} | 0 / 12 | 0.0002 | 0.0006 | better |" in text
    assert "| 40 / 0 | <0.0001 | <0.0001 | worse |" in text
    assert "## hira × token minus hira × none" in text
    assert "40 examples in common; 40 more only in hira × none, 10 more only in lora × none." in text
    assert LOSS_SECTION in text
    loss = "| hira × token | 160 | 1.5000 | +0.0000 [+0.0000, +0.0000] | 1.0000 | no difference shown |"
    assert loss in text
    assert "p adjusted by Holm's method" in text
    assert "not adjusted for the number of measures or of runs" in text
    assert "says nothing about seeds" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    widths = [{line.replace("\\|", "").count("|") for line in table} for table in tables]
    assert widths == [{7}, {8}, {8}, {7}]  # seven columns where p-values are adjusted


def test_as_json_has_the_same_figures(comparison):
    found = json.loads(as_json(comparison))
    first, pair = found["runs"][0], found["pairs"][0]
    assert first["accuracy"][SUMMED]["tasks"]["arc"]["hits"] == 20
    assert first["accuracy"][SUMMED]["average"] is None  # one run has one of the tasks only
    assert first["accuracy"]["generation"]["average"]["value"] == 1.0
    assert first["accuracy"]["generation"]["average"]["tasks"] == ["arc", "b|q"]
    counts = [found["pairs"][1][name] for name in ("common", "only_baseline", "only_run")]
    assert counts == [40, 40, 10]
    entry = pair["accuracy"][0]
    assert entry["outcomes"] == {"both": 20, "only_first": 0, "only_second": 12, "neither": 8}
    assert (entry["value"], entry["verdict"], entry["p"]) == (pytest.approx(0.3), "better", 2**-12)
    average = pair["accuracy"][2]
    assert average["task"] is None
    assert average["p"] < entry["p"]
    assert entry["adjusted_p"] == average["adjusted_p"] == 3 * average["p"]  # two tasks and the average
    assert pair["nats_per_token"]["verdict"] == "no difference shown"
    assert pair["nats_per_token"]["adjusted_p"] == pair["nats_per_token"]["p"]
    assert any("Holm" in note for note in found["notes"])


def test_as_json_keeps_its_keys(comparison, compare):
    """Programs read them."""
    found = json.loads(as_json(comparison))
    assert list(found) == ["runs", "pairs", "notes"]
    assert list(found["runs"][0]) == ["label", "path", "rows", "accuracy", "tokens", "nats_per_token", "text"]
    assert list(found["runs"][0]["accuracy"]["generation"]["tasks"]["arc"]) == [
        "hits",
        "n",
        "value",
        "interval",
    ]
    assert list(found["pairs"][0]) == [
        *("baseline", "label", "common", "only_baseline", "only_run", "evaluated_otherwise"),
        *("accuracy", "nats_per_token", "retokenized", "text"),
    ]
    entry = ["measure", "task", "outcomes", "value", "low", "high", "p", "adjusted_p", "verdict"]
    assert list(found["pairs"][0]["accuracy"][0]) == entry


def test_reports_of_few_examples_have_no_interval(compare):
    """Neither the loss nor the means of text metrics."""
    result = compare([example_line()], [example_line()])
    assert json.loads(as_json(result))["pairs"][0]["nats_per_token"]["p"] is None
    assert "| +0.0000 [–, –] | – | too few examples |" in as_markdown(result)
    lines, _, _ = random_text_lines(1, n=19)
    result = compare(lines, lines)
    nothing = dict.fromkeys(("low", "high", "p", "adjusted_p"))
    expected = {"value": 0.0, **nothing, "verdict": "too few examples"}
    assert json.loads(as_json(result))["pairs"][0]["text"]["meteor"] == expected
    assert "| +0.000 [–, –] | – | – | too few examples |" in as_markdown(result)


def test_as_markdown_omits_average_of_single_task(compare):
    result = compare(*[[example_line(example=i) for i in range(30)]] * 2)
    assert "average of" not in as_markdown(result).partition("- Brackets")[0]


def test_as_markdown_names_average_of_shared_tasks(compare):
    two, three = ([example_line(task, i) for task in tasks for i in range(12)] for tasks in ("xy", "xyz"))
    assert "average of the 2 shared tasks" in as_markdown(compare(two, three))


def test_reports_call_a_higher_loss_worse(compare):
    result = compare(
        *([example_line(example=i, nll=nll + i, tokens=2) for i in range(30)] for nll in (1.0, 1.5))
    )
    assert "| worse |" in as_markdown(result)
    assert json.loads(as_json(result))["pairs"][0]["nats_per_token"]["verdict"] == "worse"


def test_as_markdown_names_losses_of_other_tokenizer(compare):
    result = compare(*([example_line(example=i, tokens=tokens) for i in range(30)] for tokens in (2, 3)))
    assert "30 of 30 common correct answers have another number of tokens" in as_markdown(result)
    assert "not comparable" in as_markdown(result)


def test_reports_of_single_candidates_have_losses_alone(compare):
    result = compare(*([solution_line(i, nll + i % 3) for i in range(30)] for nll in (2.0, 1.0)))
    text, found = as_markdown(result), json.loads(as_json(result))
    assert "## Accuracy" not in text
    assert "## Generated" not in text
    assert "| b | 90 | 0.6667 | -0.3333 [-0.3333, -0.3333] | 0.0002 | better |" in text
    assert [run["accuracy"] for run in found["runs"]] == [{}, {}]
    assert found["pairs"][0]["accuracy"] == []
    assert found["pairs"][0]["nats_per_token"]["verdict"] == "better"


def test_reports_name_different_evaluation_settings(write):
    """Method and adapter are what runs are compared for; every other difference is named."""
    identity = {
        "format": 2,
        "backbone": "f970",
        "adapter": "e8f9",
        "method": {"update": "hira"},
        "data": "5756",
        "dtype": "float32",
        "decoding": {"beams": 1, "max_new_tokens": 32},
    }
    other = identity | {"adapter": "0000", "method": {"update": "lora"}}
    changed = {"dtype": "bfloat16", "decoding": {"beams": 4, "max_new_tokens": 32}, "bert_score": "roberta"}
    folders = [write(name, [example_line(example=i) for i in range(3)]) for name in "abc"]
    for folder, content in zip(folders, (identity, other, other | changed), strict=True):
        (folder / "evaluation.json").write_text(json.dumps(content))
    result = compare_runs([read_run(folder) for folder in folders])
    assert [pair.different_settings for pair in result.pairs] == [
        {},
        {
            "bert_score": ("null", '"roberta"'),
            "decoding.beams": ("1", "4"),
            "dtype": ('"float32"', '"bfloat16"'),
        },
    ]
    text = as_markdown(result)
    assert text.count("**Different evaluation settings**") == 1
    settings = (
        'bert_score null against "roberta"; decoding.beams 1 against 4; dtype "float32" against "bfloat16".'
    )
    assert settings in text
    assert json.loads(as_json(result))["pairs"][1]["evaluated_otherwise"]["decoding.beams"] == ["1", "4"]
    (folders[2] / "evaluation.json").unlink()
    result = compare_runs([read_run(folder) for folder in folders[1:]])
    assert "Evaluation settings were not compared" in as_markdown(result)


def test_as_markdown_marks_text_metrics_of_one_run(compare):
    """METEOR was not available to the first run."""
    lines, more, meteor = random_text_lines(1)[0], *random_text_lines(2)[::2]
    for fields in lines:
        del fields["generation"]["scores"]["meteor"]
    text = as_markdown(compare(lines, more))
    assert f"| METEOR | b | {meteor.mean():.3f} |  |  |  | not tested |" in text
    assert "METEOR | a" not in text


def test_as_markdown_and_as_json_agree_on_text_metrics(compare):
    result = compare(*(random_text_lines(seed, shift=shift)[0] for seed, shift in ((1, 0), (2, 0.2), (3, 0))))
    markdown, found = as_markdown(result), json.loads(as_json(result))
    table = markdown.partition(f"{TEXT_SECTION}\n\n")[2].partition("\n\n")[0]
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert head == ["metric", "run", "value", "difference on common examples", "p", "p (Holm)", "verdict"]
    names = {
        "F1": "token_f1",
        "METEOR": "meteor",
        "BLEU": "bleu",
        "distinct-1": "distinct_1",
        "distinct-2": "distinct_2",
    }
    assert [(line[0], line[1]) for line in lines] == [(label, run) for label in names for run in "abc"]
    for label, run, value, *tested in lines:
        number, metric = "abc".index(run), names[label]
        assert value == f"{found['runs'][number]['text'][metric]:.3f}"
        pair = found["pairs"][number - 1]["text"] if number else {}
        if number == 0:
            assert tested == ["", "", "", "baseline"]
        elif metric in pair:
            numbers = pair[metric]
            difference = f"{numbers['value']:+.3f} [{numbers['low']:+.3f}, {numbers['high']:+.3f}]"
            ps = [f"{numbers[name]:.4f}" for name in ("p", "adjusted_p")]
            ps = [p if p != "0.0000" else "<0.0001" for p in ps]
            assert tested == [difference, *ps, numbers["verdict"]]
        else:
            assert tested == ["", "", "", "not tested"]
    assert [set(pair["text"]) for pair in found["pairs"]] == [{"token_f1", "meteor"}] * 2
    assert found["pairs"][0]["text"]["token_f1"]["verdict"] == "better"
    assert found["runs"][0]["accuracy"] == {}
    assert "## Accuracy" not in markdown
    assert LOSS_SECTION not in markdown


HOSTILE = "a\x1b[31m\x9b2J\u202ed\x7f | `x`\n# y"


def test_reports_escape_what_controls_a_terminal(write):
    runs = [
        read_run(write(name, [example_line(HOSTILE, i) for i in range(3)], {"update": HOSTILE, "gate": name}))
        for name in "ab"
    ]
    result = compare_runs(runs)
    for text in (as_markdown(result), as_json(result)):
        assert not set(text) & set("\x1b\x9b\u202e\x7f")
    (task, *_) = json.loads(as_json(result))["runs"][0]["accuracy"][SUMMED]["tasks"]
    assert task == HOSTILE
    assert "\n# y" not in as_markdown(result)
