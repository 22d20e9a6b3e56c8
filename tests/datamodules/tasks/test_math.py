"""Word problems: the three schemas, both styles, rows without a correct answer, and the sample data."""

import doctest
import logging
import math
import re
from fractions import Fraction

import pytest

from gatera_lightning.datamodules.answers.numbers import parse_number
from gatera_lightning.datamodules.answers.options import ParsedAnswer
from gatera_lightning.datamodules.tasks import math as math_task
from gatera_lightning.datamodules.tasks.math import TASKS, Problem, parse_problem
from gatera_lightning.errors import ConfigError

CLIPS = "Ann sold 48 clips in April and half as many in May. How many is that?"
GSM8K = {
    "question": CLIPS,
    "answer": "In May it was 48/2 = <<48/2=24>>24.\nAll are 48+24 = <<48+24=72>>72.\n#### 72",
}
METAMATH = {
    "type": "GSM_AnsAug",
    "query": CLIPS,
    "original_question": CLIPS,
    "response": "May: 48/2 = 24.\nAll: 72.\n#### 72\nThe answer is: 72",
}
EXPRESSION = {
    "type": "MATH_AnsAug",
    "query": "What is $x + x + 1$?",
    "response": "Add.\nThe answer is: $2x + 1$",
}
ADAPTERS = {
    "instruction": f" {CLIPS} ",
    "input": "",
    "output": "\nA: 48 + 48 = 96. The answer is 96.",
    "answer": "72.0",
}
LETTER = {
    "instruction": "How much is 5 + 5? Answer Choices: (A) 9 (B) 8 (C) 10 (D) 11 (E) 12",
    "input": "",
    "output": "\nRationale: 5 + 5 = 11.The answer is (D).",
    "answer": "C",
}


@pytest.fixture
def build_example(make_math_data):
    """``build_example(row, **settings)`` is the example of a row."""
    return lambda row, **settings: make_math_data(**settings).example(row, "mine")


# --- examples ---


@pytest.mark.parametrize(
    ("row", "style", "text"),
    [
        (GSM8K, "gsm8k", "In May it was 48/2 = 24.\nAll are 48+24 = 72.\n#### 72"),
        (GSM8K, "metamath", "In May it was 48/2 = 24.\nAll are 48+24 = 72.\nThe answer is: 72"),
        (METAMATH, "gsm8k", "May: 48/2 = 24.\nAll: 72.\n#### 72"),
        (METAMATH, "metamath", METAMATH["response"]),
        (ADAPTERS, "gsm8k", "#### 72"),
        (ADAPTERS, "metamath", "The answer is: 72"),
        (LETTER, "gsm8k", "#### C"),
        (LETTER, "metamath", "The answer is: C"),
        ({"question": "q", "answer": "1 + 1 = <<1+1=2>>2 #### 1,002 "}, "gsm8k", "1 + 1 = 2\n#### 1,002"),
        (
            {"question": "q", "answer": "1 + 1 = <<1+1=2>>2 #### 1,002 "},
            "metamath",
            "1 + 1 = 2 The answer is: 1,002",
        ),
        ({"question": "q", "answer": "-15.0"}, "gsm8k", "#### -15"),
        (
            {"query": "q", "response": "A #### line.\nSo 5. The answer is: 5"},
            "gsm8k",
            "A #### line.\nSo 5.\n#### 5",
        ),
        (
            {"query": "q", "response": "The answer is: 4\nThe answer is: 5\n"},
            "metamath",
            "The answer is: 4\nThe answer is: 5",
        ),
        (
            {"query": "q", "response": "a <<b>> c\nThe answer is: 5"},
            "metamath",
            "a <<b>> c\nThe answer is: 5",
        ),
        ({"instruction": "q", "answer": 8}, "gsm8k", "#### 8"),
        ({"instruction": "q", "answer": 0.6666666666666666}, "gsm8k", "#### 0.6666666666666666"),
    ],
)
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_solution_in_both_styles(row, style, text, template, build_example):
    found = build_example(row, answer_style=style, template=template)
    assert found.answers == [f" {text}" if template == "plain" else text]
    assert found.gold == 0
    assert found.labels == [text.split(": " if style == "metamath" else "#### ")[-1]]


def test_keep_annotations(build_example):
    assert build_example(GSM8K, keep_annotations=True).answers == [f" {GSM8K['answer']}"]
    metamath = build_example(GSM8K, keep_annotations=True, answer_style="metamath")
    assert metamath.answers == [f" {GSM8K['answer']}".replace("####", "The answer is:")]


@pytest.mark.parametrize("row", [GSM8K, METAMATH, ADAPTERS])
def test_prompt_and_identity_are_the_question(row, build_example):
    found = build_example(row)
    assert found.prompt == f"Question: {CLIPS}\nAnswer:"
    assert found.identity == CLIPS
    assert (found.task, found.chat) == ("mine", False)
    other = build_example(row, template="alpaca", answer_style="metamath")
    assert other.prompt.endswith(f"### Instruction:\n{CLIPS}\n\n### Response:\n")
    assert other.key == found.key == build_example(GSM8K).key


def test_chat_template(build_example, chat_tokenizers):
    found = build_example(GSM8K, template="chat", tokenizer=chat_tokenizers["llama3"])
    assert found.chat
    assert CLIPS in found.prompt
    assert found.answers[0].strip() == "In May it was 48/2 = 24.\nAll are 48+24 = 72.\n#### 72"


def test_rationale_of_llm_adapters_is_ignored(build_example):
    other = {**ADAPTERS, "output": "The answer is: 1 #### 2"}
    without = {name: ADAPTERS[name] for name in ("instruction", "answer")}
    assert build_example(ADAPTERS) == build_example(other) == build_example(without)


def test_doctests():
    assert doctest.testmod(math_task) == (0, 1)
    assert parse_problem(ADAPTERS) == Problem(CLIPS, "", "72.0")


# --- generated answers ---


@pytest.mark.parametrize(
    ("gold", "text", "answer", "choice"),
    [
        ("72", "24 + 48 = 72\n#### 72", "72", 0),
        ("72", "24 + 48 = 72\nThe answer is: 72.0 clips.", "72.0", 0),
        ("72", "24 + 48 = 72\n#### 71", "71", None),
        ("72", "72\n#### none", None, None),
        ("72", "", None, None),
        ("72", "it is seventy-two", None, None),
        ("72", "The answer is: 5/0", "5/0", None),
        ("0.6666666666666666", "#### 2/3", "2/3", 0),
        ("0.6666666666666666", "#### 0.67", "0.67", None),
        ("-15", "#### −15", "-15", 0),
        ("-15", "#### 15", "15", None),
        ("1,080", "It is $1080.00", "$1080.00", 0),
        ("3.5", "#### $3.50", "$3.50", 0),
        ("50", "#### 50%", "50", 0),
        ("C", "The answer is (C).", "C", 0),
        ("C", "#### D", "D", None),
        ("C", "The answer is: 10", None, None),
        ("C", "(C)", "C", 0),
    ],
)
def test_answer_is_compared_by_value(gold, text, answer, choice, make_math_data):
    assert make_math_data().parse_answer(text, [gold]) == ParsedAnswer(answer, choice)


@pytest.mark.parametrize("gold", ["x + 1", "", "F", "AB", "3 or 4"])
def test_correct_answer_must_be_a_number_or_a_letter(gold, make_math_data):
    message = f"label {re.escape(repr(gold))}: expected a number or a letter of ABCDE"
    with pytest.raises(ValueError, match=message):
        make_math_data().parse_answer("#### 5", [gold])


# --- rows without a correct answer, and malformed rows ---

NO_GOLD = [
    {**ADAPTERS, "answer": ""},
    {**ADAPTERS, "answer": "unknown"},
    {**ADAPTERS, "answer": "3 or 4"},
    {**ADAPTERS, "answer": None},
    {**ADAPTERS, "answer": ["72"]},
    {**ADAPTERS, "answer": True},
    {**ADAPTERS, "answer": math.nan},
    {**ADAPTERS, "answer": "1/0"},
    {"instruction": CLIPS, "output": "The answer is 72."},
    {**LETTER, "answer": "F"},
    {**LETTER, "answer": "c"},
    {**LETTER, "answer": "AB"},
    {"question": CLIPS, "answer": "In May it was 24, so 72."},
    {"question": CLIPS, "answer": "So 72.\n####"},
    {"question": CLIPS, "answer": "So 72.\n#### seventy-two"},
    {"question": CLIPS},
    {"query": CLIPS, "response": "So it is 72."},
    {"query": CLIPS, "response": "So 72.\n#### 72"},
    {"query": CLIPS, "response": "So 72.\nThe answer is:"},
    {"query": CLIPS, "response": None},
]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("row", NO_GOLD)
def test_row_without_correct_answer_is_skipped(row, split, make_math_data, write, caplog):
    path = write("rows.json", [GSM8K, row, ADAPTERS, row, LETTER])
    with caplog.at_level(logging.WARNING):
        examples = list(make_math_data(**{split: [path]}).examples(split))
    assert [example.labels for example in examples] == [["72"], ["72"], ["C"]]
    message = caplog.records[0].getMessage()
    field = "response" if "query" in row else "answer"
    assert message.startswith(f"data.{split}: skipped 2 rows without a usable answer")
    assert f": {path}, row 2: field '{field}': expected it to end in a number or a letter of ABCDE" in message
    assert f"; {path}, row 4: " in message


def test_expression_of_metamath_is_used_for_training_only(make_math_data, write, caplog):
    path = write("rows.json", [METAMATH, EXPRESSION, EXPRESSION])
    splits = {split: [path] for split in ("train", "validation", "test")}
    data = make_math_data(**splits, answer_style="metamath")
    with caplog.at_level(logging.WARNING):
        train = list(data.examples("train"))
        assert not caplog.records
        assert [len(list(data.examples(split))) for split in ("validation", "test")] == [1, 1]
    responses = [row["response"] for row in (METAMATH, EXPRESSION, EXPRESSION)]
    assert [example.answers for example in train] == [[f" {response}"] for response in responses]
    assert [record.getMessage().split(" rows")[0] for record in caplog.records] == [
        "data.validation: skipped 2",
        "data.test: skipped 2",
    ]
    assert "row 2: field 'response'" in caplog.text
    assert "found '$2x + 1$'" in caplog.text


def test_skipped_rows_are_not_in_the_token_table(make_math_data, write):
    path = write("rows.json", [NO_GOLD[0], GSM8K, EXPRESSION, LETTER])
    table = make_math_data(test=[path], stage="test").tables["test"]
    assert table["labels"] == [["72"], ["C"]]
    assert table["gold"] == [0, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "?"},
            "field 'question' is missing; a row needs one of these pairs of fields: query, response; ",
        ),
        ({}, "field 'question' is missing"),
        ("just a text", "field 'question' is missing"),
        (None, "field 'question' is missing"),
        ({"question": " ", "answer": "#### 5"}, "field 'question' is empty or not text"),
        ({"query": 5, "response": "The answer is: 5"}, "field 'query' is empty or not text"),
        ({"instruction": None, "answer": "5"}, "field 'instruction' is empty or not text"),
        ({**ADAPTERS, "input": "more"}, "field 'input' is 'more'; expected nothing"),
    ],
)
def test_malformed_row(row, message, make_math_data, write):
    path = write("rows.json", [GSM8K, row])
    with pytest.raises(ConfigError) as caught:
        list(make_math_data(train=[path]).examples("train"))
    assert str(caught.value).startswith(f"{path}, row 2: {message}")


# --- settings and sources ---


def test_problem_names_setting_value_and_accepted_values(make_math_data):
    assert make_math_data(answer_style="latex", rank_validation=True).problems("fit") == [
        "data.answer_style: 'latex' is unknown; accepted: gsm8k, metamath",
        "data.rank_validation: true, but a word problem has a single candidate, which always ranks first; "
        "accepted: false",
    ]
    assert make_math_data().problems("fit") == make_math_data().problems("test") == []


def test_unknown_task_lists_math_tasks(make_math_data):
    (problem,) = make_math_data(train=["boolq"], validation=1).problems("fit")
    assert f"accepted: {', '.join(TASKS)}, a file" in problem


def test_schema_of_hub_rows_is_recognized(make_math_data, monkeypatch):
    tables = {"meta-math/MetaMathQA": [METAMATH, EXPRESSION], "openai/gsm8k": [GSM8K]}
    monkeypatch.setattr("datasets.load_dataset", lambda name, *_, **__: tables[name])
    examples = list(make_math_data(train=[*tables], answer_style="metamath").examples("train"))
    assert [example.task for example in examples] == ["MetaMathQA", "MetaMathQA", "gsm8k"]
    assert [example.labels for example in examples] == [["72"], ["$2x + 1$"], ["72"]]


# --- sample data ---


def test_sample(make_math_data):
    data = make_math_data(stage="fit")
    data.setup("test")
    sizes = {split: len(table) for split, table in data.tables.items()}
    assert sizes == {"train": 120, "validation": 20, "test": 40}
    assert not any(overlap.indices for overlap in data.overlaps())
    assert next(iter(data.train_dataloader()))
    examples = [example for split in sizes for example in data.examples(split)]
    assert len({example.identity for example in examples}) == len(examples) == 180
    assert {example.task for example in examples} == {"arithmetic"}
    for example in examples:
        assert data.parse_answer(example.answers[0], example.labels) == ParsedAnswer(example.labels[0], 0)
    labels = "".join(example.labels[0] for example in examples)
    assert "," in labels
    assert "." in labels
    assert "-" in labels


def test_sample_annotations_are_correct(make_math_data):
    """Every calculator annotation holds, and the last one is the answer."""
    for split in ("train", "validation", "test"):
        for example in make_math_data(keep_annotations=True).examples(split):
            annotations = re.findall(r"<<([0-9.*/+-]+)=(-?[0-9.]+)>>", example.answers[0])
            assert len(annotations) == example.answers[0].count("<<") >= 2
            for expression, result in annotations:
                exact = re.sub(r"([0-9.]+)", r"Fraction('\1')", expression)
                assert eval(exact, {"Fraction": Fraction}) == Fraction(result)
            assert Fraction(annotations[-1][1]) == parse_number(example.labels[0])
