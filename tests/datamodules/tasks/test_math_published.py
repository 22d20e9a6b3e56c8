"""The published math data: every row is parsed, and answers agree with another way to read them."""

import json
import re
from decimal import Decimal
from fractions import Fraction

import pytest

from gatera_lightning.datamodules.answers.numbers import parse_number
from gatera_lightning.datamodules.answers.options import ParsedAnswer

ROW_COUNTS = {"SVAMP": 1000, "AddSub": 395, "MultiArith": 600, "SingleEq": 508, "AQuA": 254, "mawps": 238}


@pytest.fixture(scope="module")
def folder(published_data):
    return published_data / "math"


@pytest.mark.parametrize("task", ROW_COUNTS)
def test_rows_of_llm_adapters(task, folder, make_math_data, caplog):
    """No row is skipped; labels are compared with Decimal, prompts with the instruction."""
    rows = json.loads((folder / task / "test.json").read_text())
    data = make_math_data(data_dir=str(folder), test=[task])
    examples = list(data.examples("test"))
    assert len(examples) == len(rows) == ROW_COUNTS[task]
    assert not caplog.records
    for row, example in zip(rows, examples, strict=True):
        (label,) = example.labels
        assert example.answers == [f" #### {label}"]
        assert example.prompt == f"Question: {row['instruction'].strip()}\nAnswer:"
        assert data.parse_answer(example.answers[0], example.labels) == ParsedAnswer(label, 0)
        if task == "AQuA":
            assert label == row["answer"]
            stated = re.search(r"[Tt]he answer is \(?([A-E])\)?\.?$", row["output"])
            expected = stated[1] if stated else None
            assert data.parse_answer(row["output"], example.labels).answer == expected
        else:
            assert parse_number(label) == Fraction(Decimal(row["answer"]))
            assert not label.endswith(".0")


@pytest.mark.parametrize(
    ("task", "wrong"), [("SVAMP", (150, 250)), ("AddSub", (10, 100)), ("MultiArith", (0, 60))]
)
def test_rationales_of_llm_adapters_as_generated_text(task, wrong, folder, make_math_data):
    """Compared with the first number after "the answer is"; about a fifth of SVAMP's rationales are wrong."""
    data, incorrect = make_math_data(), 0
    for row in json.loads((folder / task / "test.json").read_text()):
        parsed = data.parse_answer(row["output"], [row["answer"]])
        *_, conclusion = re.split("[Tt]he answer is", row["output"].replace(",", ""))
        numbers = re.findall(r"-?\d+\.?\d*", conclusion)
        if row["output"].count("he answer is") == 1 and "/" not in conclusion:
            correct = bool(numbers) and abs(float(numbers[0]) - float(row["answer"])) < 1e-9
            assert (parsed.answer is None) == (not numbers)
            assert (parsed.choice == 0) == correct
        incorrect += parsed.choice is None
    assert wrong[0] <= incorrect <= wrong[1]


@pytest.mark.slow
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 660)])
@pytest.mark.parametrize(("style", "marker"), [("gsm8k", "####"), ("metamath", "The answer is:")])
def test_rows_of_gsm8k(split, count, style, marker, folder, make_math_data, caplog):
    """Compared with splitting at the last line, removing annotations by hand, and GSM8K's own expression."""
    rows = [json.loads(line) for line in (folder / "gsm8k" / f"{split}.jsonl").read_text().splitlines()]
    data = make_math_data(data_dir=str(folder), answer_style=style, **{split: ["gsm8k"]})
    examples = list(data.examples(split))
    assert len(examples) == len(rows) == count
    assert not caplog.records
    for row, example in zip(rows, examples, strict=True):
        *lines, last = row["answer"].split("\n")
        gold = re.fullmatch(r"#### (\-?[0-9\.\,]+)", last)[1]
        first, *annotated = "\n".join(lines).split("<<")
        solution = first + "".join(part.partition(">>")[2] for part in annotated)
        assert example.answers[0].strip() == f"{solution.strip()}\n{marker} {gold}"
        assert example.labels == [gold]
        assert data.parse_answer(example.answers[0], example.labels) == ParsedAnswer(gold, 0)
        assert data.parse_answer(row["answer"], example.labels) == ParsedAnswer(gold, 0)
