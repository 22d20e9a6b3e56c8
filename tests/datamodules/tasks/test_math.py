"""Math rows: the three schemas, golds, styles, rows without a gold, real files read a second way, the embedded sample."""

import doctest
import json
import logging
import math
import os
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

import gatera_lightning.datamodules.tasks.math as math_data
from gatera_lightning.datamodules.answers.numbers import parse_number
from gatera_lightning.datamodules.answers.options import ParsedAnswer
from gatera_lightning.datamodules.tasks.math import TASKS, MathDataModule, Problem, parse_problem
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
def make_math(tokenizer):
    def build(*, stage=None, **settings):
        defaults = {"template": "plain", "answer_style": "gsm8k", "train_on": "response", "max_length": 2048}
        module = MathDataModule(**(defaults | settings))
        module.connect(tokenizer)
        if stage:
            module.setup(stage)
        return module

    return build


@pytest.fixture
def example(make_math):
    return lambda row, **settings: make_math(**settings).example(row, "mine")


# --- what a row becomes ---


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
def test_solution_in_the_style_that_is_asked_for(row, style, text, template, example):
    found = example(row, answer_style=style, template=template)
    assert found.answers == [f" {text}" if template == "plain" else text]
    assert found.gold == 0
    assert found.labels == [text.split(": " if style == "metamath" else "#### ")[-1]]


def test_annotations_are_kept_on_request(example):
    assert example(GSM8K, keep_annotations=True).answers == [f" {GSM8K['answer']}"]
    assert example(GSM8K, keep_annotations=True, answer_style="metamath").answers == [
        f" {GSM8K['answer']}".replace("####", "The answer is:")
    ]


@pytest.mark.parametrize("row", [GSM8K, METAMATH, ADAPTERS])
def test_prompt_and_identity_are_the_question(row, example):
    found = example(row)
    assert found.prompt == f"Question: {CLIPS}\nAnswer:"
    assert found.identity == CLIPS
    assert (found.task, found.chat) == ("mine", False)
    assert example(row, template="alpaca").prompt.endswith(f"### Instruction:\n{CLIPS}\n\n### Response:\n")
    assert example(row, answer_style="metamath").key == found.key == example(GSM8K, template="alpaca").key


def test_chat_prompts_are_the_tokenizers(make_math, chat_tokenizers):
    data = make_math()
    data.template = "chat"
    data.connect(chat_tokenizers["llama3"])
    found = data.example(GSM8K, "mine")
    assert found.chat
    assert CLIPS in found.prompt
    assert found.answers[0].strip() == "In May it was 48/2 = 24.\nAll are 48+24 = 72.\n#### 72"


def test_the_rationale_of_llm_adapters_is_never_read(example):
    other = {**ADAPTERS, "output": "The answer is: 1 #### 2"}
    assert (
        example(ADAPTERS)
        == example(other)
        == example({name: ADAPTERS[name] for name in ("instruction", "answer")})
    )


# --- reading what a model wrote ---


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
        ("50", "#### 50%", "50%"[:2], 0),
        ("C", "The answer is (C).", "C", 0),
        ("C", "#### D", "D", None),
        ("C", "The answer is: 10", None, None),
        ("C", "(C)", "C", 0),
    ],
)
def test_an_answer_is_right_by_its_value(gold, text, answer, choice, make_math):
    assert make_math().parse_answer(text, [gold]) == ParsedAnswer(answer, choice)


@pytest.mark.parametrize("gold", ["x + 1", "", "F", "AB", "3 or 4"])
def test_a_gold_without_a_value_judges_nothing(gold, make_math):
    with pytest.raises(
        ValueError, match=f"label {re.escape(repr(gold))}: expected a parse_number or a letter of ABCDE"
    ):
        make_math().parse_answer("#### 5", [gold])


# --- rows without a gold, and rows of no schema ---

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
@pytest.mark.parametrize("bad", NO_GOLD)
def test_a_row_without_a_gold_is_left_out_and_listed(bad, split, make_math, write, caplog):
    path = write("rows.json", [GSM8K, bad, ADAPTERS, bad, LETTER])
    with caplog.at_level(logging.WARNING):
        found = list(make_math(**{split: [path]}).examples(split))
    assert [example.labels for example in found] == [["72"], ["72"], ["C"]]
    (record,) = caplog.records
    message = record.getMessage()
    counted = f"data.{split}: 2 rows without an answer to judge by are left out"
    assert message.startswith(
        f"{counted}: {path}, row 2: field '{'response' if 'query' in bad else 'answer'}'"
    )
    assert f"; {path}, row 4: " in message
    assert not message.endswith("…")


def test_an_expression_trains_and_is_never_judged(make_math, write, caplog):
    path = write("rows.json", [METAMATH, EXPRESSION, EXPRESSION])
    data = make_math(train=[path], validation=[path], test=[path], answer_style="metamath")
    with caplog.at_level(logging.WARNING):
        train = list(data.examples("train"))
    assert not caplog.records
    assert [example.answers for example in train] == [
        [f" {row['response']}"] for row in (METAMATH, EXPRESSION, EXPRESSION)
    ]
    for split in ("validation", "test"):
        assert len(list(data.examples(split))) == 1
    assert [record.getMessage().split(" rows")[0] for record in caplog.records] == [
        "data.validation: 2",
        "data.test: 2",
    ]
    assert (
        "row 2: field 'response': expected a parse_number or a letter of ABCDE at its end, found '$2x + 1$'"
        in caplog.text
    )


def test_the_list_of_rows_that_are_left_out_is_short(make_math, write, caplog):
    sources = [
        write("a.json", [NO_GOLD[0]] * 4 + [GSM8K]),
        write("b.jsonl", "\n".join([json.dumps(NO_GOLD[1])] * 3)),
    ]
    with caplog.at_level(logging.WARNING):
        assert len(list(make_math(test=sources).examples("test"))) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("data.test: 7 rows ")
    assert record.getMessage().count(", row ") == 5
    assert record.getMessage().endswith("; …")


def test_a_slice_counts_the_rows_of_the_file(make_math, write, caplog):
    path = write("rows.json", [NO_GOLD[0], GSM8K, ADAPTERS])
    assert len(list(make_math(test=[f"{path}[:2]"]).examples("test"))) == 1
    assert "data.test: 1 rows" in caplog.text


def test_only_rows_without_a_gold_make_an_empty_split(make_math, write):
    with pytest.raises(ConfigError, match=r"^data\.test: the split is empty"):
        make_math(test=[write("rows.json", NO_GOLD)], stage="test")


def test_rows_left_out_are_in_no_table(make_math, write):
    data = make_math(test=[write("rows.json", [NO_GOLD[0], GSM8K, EXPRESSION, LETTER])], stage="test")
    assert data.tables["test"]["labels"] == [["72"], ["C"]]
    assert data.tables["test"]["gold"] == [0, 0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"text": "?"},
            "field 'question' is missing; a row needs one of these pairs of fields: query, response; ",
        ),
        ({}, "field 'question' is missing"),
        ("just a text", "field 'question' is missing"),
        (None, "field 'question' is missing"),
        ({"question": " ", "answer": "#### 5"}, "field 'question' is not a text"),
        ({"query": 5, "response": "The answer is: 5"}, "field 'query' is not a text"),
        ({"instruction": None, "answer": "5"}, "field 'instruction' is not a text"),
        ({**ADAPTERS, "input": "more"}, "field 'input' is 'more'; expected nothing"),
    ],
)
def test_a_row_of_no_schema_stops_the_run(bad, message, make_math, write):
    path = write("rows.json", [GSM8K, bad])
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}, row 2: {message}')}"):
        list(make_math(train=[path]).examples("train"))


# --- settings and files ---


def test_settings_that_cannot_work(make_math):
    found = make_math(answer_style="latex", rank_validation=True).problems("fit")
    assert found == [
        "data.answer_style: 'latex' is unknown; accepted: gsm8k, metamath",
        "data.rank_validation: true, and a math row has one candidate, which always ranks first; accepted: false",
    ]
    assert make_math().problems("fit") == make_math().problems("test") == []


def test_a_task_is_json_lines_or_json(make_math, write, tmp_path):
    write("gsm8k/test.jsonl", json.dumps(GSM8K))
    write("gsm8k/train.json", [METAMATH])
    write("AQuA/test.json", [LETTER])
    write("SVAMP/test.jsonl", json.dumps(ADAPTERS))
    write("SVAMP/test.json", [])
    data = make_math(
        data_dir=str(tmp_path / "data"), train=["gsm8k"], test=["gsm8k", "AQuA", "SVAMP"], validation=1
    )
    assert data.problems("fit") == data.problems("test") == []
    assert [example.task for example in data.examples("test")] == ["gsm8k", "AQuA", "SVAMP"]
    assert len(list(data.examples("train"))) == 1
    (problem,) = make_math(data_dir=str(tmp_path / "data"), train=["mawps"], validation=1).problems("fit")
    assert problem.startswith(
        f"data.train: task 'mawps' needs the file {tmp_path}/data/mawps/train.json, which does not exist"
    )
    (problem,) = make_math(data_dir=str(tmp_path / "data"), train=["boolq"], validation=1).problems("fit")
    assert f"accepted: {', '.join(TASKS)}, a file" in problem


def test_hub_rows_are_recognised_by_their_fields(make_math, monkeypatch):
    import datasets

    tables = {"meta-math/MetaMathQA": [METAMATH, EXPRESSION], "openai/gsm8k": [GSM8K]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **settings: tables[name])
    found = list(make_math(train=[*tables], answer_style="metamath").examples("train"))
    assert [example.task for example in found] == ["MetaMathQA", "MetaMathQA", "gsm8k"]
    assert [example.labels for example in found] == [["72"], ["$2x + 1$"], ["72"]]


# --- real rows ---


@pytest.fixture(scope="session")
def real_math():
    """The folder of real math rows."""
    if "GATERA_DATA" not in os.environ:
        pytest.skip("GATERA_DATA is unset: it names the folder with the real rows")
    return Path(os.environ["GATERA_DATA"]) / "math"


REAL = {"SVAMP": 1000, "AddSub": 395, "MultiArith": 600, "SingleEq": 508, "AQuA": 254, "mawps": 238}


@pytest.mark.parametrize("task", REAL)
def test_real_rows_of_llm_adapters(task, real_math, make_math, caplog):
    """Golds by Decimal, prompts by the instruction; not one row is left out, and none has a solution."""
    rows = json.loads((real_math / task / "test.json").read_text())
    data = make_math(data_dir=str(real_math), test=[task])
    examples = list(data.examples("test"))
    assert len(examples) == len(rows) == REAL[task]
    assert not caplog.records
    for row, example in zip(rows, examples, strict=True):
        (label,) = example.labels
        assert example.answers == [f" #### {label}"]
        assert example.prompt == f"Question: {row['instruction'].strip()}\nAnswer:"
        assert data.parse_answer(example.answers[0], example.labels) == ParsedAnswer(label, 0)
        if task == "AQuA":
            assert label == row["answer"]
            told = re.search(r"[Tt]he answer is \(?([A-E])\)?\.?$", row["output"])
            assert data.parse_answer(row["output"], example.labels).answer == (told[1] if told else None)
        else:
            assert parse_number(label) == Fraction(Decimal(row["answer"]))
            assert not label.endswith(".0")


@pytest.mark.parametrize(
    ("task", "wrong"), [("SVAMP", (150, 250)), ("AddSub", (10, 100)), ("MultiArith", (0, 60))]
)
def test_real_rationales_read_as_a_models_text(task, wrong, real_math, make_math):
    """By another reading, the first parse_number after the words; SVAMP's rationales are wrong in about one row of five."""
    rows = json.loads((real_math / task / "test.json").read_text())
    data, disagree = make_math(), 0
    for row in rows:
        reading = data.parse_answer(row["output"], [row["answer"]])
        *_, told = re.split("[Tt]he answer is", row["output"].replace(",", ""))
        numbers = re.findall(r"-?\d+\.?\d*", told)
        if row["output"].count("he answer is") == 1 and "/" not in told:
            assert (reading.answer is None) == (not numbers)
            assert (reading.choice == 0) == (
                bool(numbers) and abs(float(numbers[0]) - float(row["answer"])) < 1e-9
            )
        disagree += reading.choice is None
    assert wrong[0] <= disagree <= wrong[1]


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 660)])
@pytest.mark.parametrize("style", ["gsm8k", "metamath"])
def test_real_rows_of_gsm8k(split, count, style, real_math, make_math, caplog):
    """By another reading: split at the last line, annotations cut out by hand, GSM8K's own expression for the parse_number."""
    rows = [json.loads(line) for line in (real_math / "gsm8k" / f"{split}.jsonl").read_text().splitlines()]
    data = make_math(data_dir=str(real_math), answer_style=style, **{split: ["gsm8k"]})
    examples = list(data.examples(split))
    assert len(examples) == len(rows) == count
    assert not caplog.records
    mark = {"gsm8k": "####", "metamath": "The answer is:"}[style]
    for row, example in zip(rows, examples, strict=True):
        *lines, last = row["answer"].split("\n")
        gold = re.fullmatch(r"#### (\-?[0-9\.\,]+)", last)[1]
        plain = "".join(
            part.partition(">>")[2] if i else part for i, part in enumerate("\n".join(lines).split("<<"))
        )
        assert example.answers[0].strip() == f"{plain.strip()}\n{mark} {gold}"
        assert example.labels == [gold]
        assert data.parse_answer(example.answers[0], example.labels) == ParsedAnswer(gold, 0)
        assert data.parse_answer(row["answer"], example.labels) == ParsedAnswer(gold, 0)


# --- the embedded sample ---


def test_the_sample(make_math):
    data = make_math()
    questions = []
    for split, count in (("train", 120), ("validation", 20), ("test", 40)):
        examples = list(data.examples(split))
        assert len(examples) == count
        assert {example.task for example in examples} == {"arithmetic"}
        questions += [example.identity for example in examples]
        for example in examples:
            assert data.parse_answer(example.answers[0], example.labels) == ParsedAnswer(example.labels[0], 0)
    assert len(set(questions)) == len(questions)
    labels = [
        label for split in ("train", "test") for example in data.examples(split) for label in example.labels
    ]
    assert any("," in label for label in labels)
    assert any("." in label for label in labels)
    assert any("-" in label for label in labels)


def test_solutions_of_the_sample_add_up(make_math):
    """Every annotation is true, and the last one is the answer."""
    for split in ("train", "validation", "test"):
        for example in make_math(keep_annotations=True).examples(split):
            sums = re.findall(r"<<([0-9.*/+-]+)=(-?[0-9.]+)>>", example.answers[0])
            assert len(sums) == example.answers[0].count("<<") >= 2
            for sum_, result in sums:
                assert eval(
                    re.sub(r"([0-9.]+)", r"Fraction('\1')", sum_), {"Fraction": Fraction}
                ) == Fraction(result)
            assert Fraction(sums[-1][1]) == parse_number(example.labels[0])


def test_it_trains_validates_and_tests_on_the_sample(make_math):
    data = make_math(stage="fit")
    data.setup("test")
    assert {split: len(table) for split, table in data.tables.items()} == {
        "train": 120,
        "validation": 20,
        "test": 40,
    }
    assert not any(row for found in data.overlaps() for row in found.rows)
    assert next(iter(data.train_dataloader()))


def test_examples_in_the_docstrings():
    assert doctest.testmod(math_data) == (0, 1)
    assert parse_problem(ADAPTERS) == Problem(CLIPS, "", "72.0")
