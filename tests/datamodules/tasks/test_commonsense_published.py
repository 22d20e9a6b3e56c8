"""The published commonsense data: every row is parsed completely."""

import json
import re
from collections import Counter

import pytest

from gatera_lightning.datamodules.tasks.commonsense import TASKS, parse_question

PUBLISHED_FILES = [
    *((task, "test") for task in TASKS if task != "everyday"),
    *((task, "train") for task in ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")),
]
OPTION_COUNTS = {
    "boolq": {2},
    "piqa": {2},
    "social_i_qa": {3},
    "hellaswag": {4},
    "winogrande": {2},
    "openbookqa": {4},
}


def without_spaces(text):
    return "".join(text.split())


@pytest.mark.parametrize(("task", "split"), PUBLISHED_FILES)
def test_published_rows_are_parsed_completely(task, split, published_data):
    """Question, options and labels make up the instruction, except for its lead-in and white space."""
    counts = Counter()
    for row in json.loads((published_data / "commonsense" / task / f"{split}.json").read_text()):
        parsed = parse_question(row)
        options = ""
        if task != "boolq":
            named = zip(parsed.labels, parsed.options, strict=True)
            options = "".join(f"{label.title()}:{option}" for label, option in named)
        rebuilt = without_spaces(f"{parsed.question}{options}Answer format:{'/'.join(parsed.labels)}")
        instruction = without_spaces(row["instruction"])
        assert instruction.endswith(rebuilt)
        assert re.fullmatch(r"Please(choose|answer)[a-z,]+:", instruction.removesuffix(rebuilt))
        assert parsed.labels[parsed.gold] == row["answer"]
        assert row["output"] == f"the correct answer is {row['answer']}"
        counts[len(parsed.options)] += 1
    assert set(counts) <= OPTION_COUNTS.get(task, {3, 4, 5})
    assert counts.most_common(1)[0][0] == max(OPTION_COUNTS.get(task, {4}))
    if (task, split) == ("ARC-Easy", "train"):  # counted with grep
        assert counts == {4: 2241, 3: 6, 5: 4}


LABELS = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
    "winogrande": ["option1", "option2"],
    **{task: [f"answer{n}" for n in range(1, 6)] for task in ("ARC-Easy", "ARC-Challenge", "openbookqa")},
}


@pytest.mark.parametrize("task", LABELS)
def test_token_table_of_published_rows(task, published_data, make_data, tokenizers_by_kind):
    """Labels, characters and gold of both answer formats, compared with another way to parse the rows."""
    folder = published_data / "commonsense"
    rows = json.loads((folder / task / "test.json").read_text())[:40]
    settings = {"tokenizer": tokenizers_by_kind["words"], "test": [f"{task}[:40]"], "data_dir": str(folder)}
    label, content = (
        make_data(answer_format=form, stage="test", **settings) for form in ("label", "content")
    )
    assert len(label.tables["test"]) == len(content.tables["test"]) == len(rows)
    for row, by_label, by_content in zip(rows, label.tables["test"], content.tables["test"], strict=True):
        names = row["instruction"].split("Answer format:")[1].strip().split("/")
        assert names == LABELS[task][: len(names)]
        body = re.sub(r"\s*Answer format:.*", "", row["instruction"], flags=re.DOTALL)
        parts = re.split("|".join(f"{name.title()}:" for name in names), body)[1:]
        texts = [part.strip() for part in parts] or names
        assert len(texts) == len(names)
        assert by_label["labels"] == names
        assert by_label["characters"] == [len(f"the correct answer is {name}") for name in names]
        assert by_content["labels"] == texts
        assert by_content["characters"] == [len(text) for text in texts]
        assert by_label["gold"] == by_content["gold"] == names.index(row["answer"])
        assert by_label["task"] == by_content["task"] == task
        assert by_label["key"] == by_content["key"]
        gold = by_label["gold"]
        assert label.parse_answer(row["output"], names).choice == gold
        if len({text.casefold() for text in texts}) == len(texts):
            assert content.parse_answer(f" {texts[gold]}\n", texts).choice == gold


def test_published_data_by_variable(published_data, make_data):
    data = make_data(
        data_dir="$GATERA_DATA/commonsense",
        train=["ARC-Easy[:3]", "boolq[:2]"],
        validation=1,
        answer_format="content",
    )
    assert data.problems("fit") == []
    examples = list(data.examples("train"))
    assert [example.task for example in examples] == ["ARC-Easy"] * 3 + ["boolq"] * 2
    assert [len(example.answers) for example in examples] == [4, 4, 4, 2, 2]
