"""Multiple-choice questions: parsing, prompts and answers in both formats, and the sample data."""

import doctest
import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from gatera_lightning.datamodules.tasks import commonsense
from gatera_lightning.datamodules.tasks.commonsense import TASKS, parse_question

SAMPLES = Path(str(resources.files("gatera_lightning.datamodules"))) / "samples" / "everyday"
LEAD = "Please choose the correct answer to the question: "


def parse(instruction, answer):
    question = parse_question({"instruction": instruction, "answer": answer})
    return question.question, question.labels, question.options, question.gold


# --- parsing ---

# A row of each task: instruction, answer, and the expected question.
WORDINGS = {
    "boolq": (
        "Please answer the following question with true or false, question: is ale stronger than lager?\n\n"
        "Answer format: true/false",
        "false",
        ("is ale stronger than lager?", ("true", "false"), ("true", "false"), 1),
    ),
    "piqa": (
        "Please choose the correct solution to the question: How do I dry a shirt?\n\n"
        "Solution1: Hang it up, in the sun.\n\nSolution2: Put it in a bucket: a full one.\n\n"
        "Answer format: solution1/solution2",
        "solution1",
        (
            "How do I dry a shirt?",
            ("solution1", "solution2"),
            ("Hang it up, in the sun.", "Put it in a bucket: a full one."),
            0,
        ),
    ),
    "social_i_qa": (
        LEAD + "Tracy stayed. What will Tracy do next?\n\n"
        "Answer1: make a new plan Answer2: Go home and see Riley Answer3: Find somewhere to go\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
        (
            "Tracy stayed. What will Tracy do next?",
            ("answer1", "answer2", "answer3"),
            ("make a new plan", "Go home and see Riley", "Find somewhere to go"),
            2,
        ),
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: "
        "Roof shingle removal: A man is on a roof. he\n\n"
        "Ending1: is using wrap. Ending2: is ripping tiles off. "
        "Ending3: is holding a cube. Ending4: starts pulling.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending4",
        (
            "Roof shingle removal: A man is on a roof. he",
            ("ending1", "ending2", "ending3", "ending4"),
            ("is using wrap.", "is ripping tiles off.", "is holding a cube.", "starts pulling."),
            3,
        ),
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Sarah was better than Maria so _ got the easier cases.\n\n"
        "Option1: Sarah Option2: Maria Answer format: option1/option2",
        "option2",
        (
            "Sarah was better than Maria so _ got the easier cases.",
            ("option1", "option2"),
            ("Sarah", "Maria"),
            1,
        ),
    ),
    "ARC-Easy": (
        LEAD + "Which one burns?\n\nAnswer1: wood Answer2: water Answer3: air Answer4: rock Answer5: ice\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer1",
        (
            "Which one burns?",
            tuple(f"answer{k}" for k in range(1, 6)),
            ("wood", "water", "air", "rock", "ice"),
            0,
        ),
    ),
    "ARC-Challenge": (
        LEAD + "A planet rotates faster. What follows?\n\n"
        "Answer1: Its density will fall. Answer2: Its days become shorter. Answer3: Nothing.\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
        (
            "A planet rotates faster. What follows?",
            ("answer1", "answer2", "answer3"),
            ("Its density will fall.", "Its days become shorter.", "Nothing."),
            1,
        ),
    ),
    "openbookqa": (
        LEAD + "The sun is responsible for\n\n"
        "Answer1: puppies learning Answer2: children growing up "
        "Answer3: flowers wilting Answer4: plants sprouting, wilting\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer4",
        (
            "The sun is responsible for",
            ("answer1", "answer2", "answer3", "answer4"),
            ("puppies learning", "children growing up", "flowers wilting", "plants sprouting, wilting"),
            3,
        ),
    ),
}


@pytest.mark.parametrize("task", WORDINGS)
def test_parse_question(task):
    instruction, answer, expected = WORDINGS[task]
    assert parse(instruction, answer) == expected


def test_every_published_task_is_tested():
    assert {*WORDINGS, "everyday"} == set(TASKS)


@pytest.mark.parametrize(
    "question",
    [
        "Which label is first, Answer1: or Answer2: here?",
        "What does the answer format: line say?",
        "What does 'Answer format: answer1/answer2' say?",
        "Two lines\n\nof Answer1: text",
    ],
)
def test_question_may_contain_option_labels(question):
    instruction = f"{LEAD}{question}\n\nAnswer1: one Answer2: two\n\nAnswer format: answer1/answer2"
    assert parse(instruction, "answer2") == (question, ("answer1", "answer2"), ("one", "two"), 1)


def test_question_may_have_more_than_nine_options():
    labels = [f"answer{k}" for k in range(1, 12)]
    options = " ".join(f"Answer{k}: thing{k}" for k in range(1, 12))
    parsed = parse(f"{LEAD}Which?\n\n{options}\n\nAnswer format: {'/'.join(labels)}", "answer11")
    assert parsed[2:] == (tuple(f"thing{k}" for k in range(1, 12)), 10)


def test_question_without_lead_in():
    instruction = "Why: this?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"
    assert parse(instruction, "answer1")[0] == "Why: this?"


@pytest.mark.parametrize(
    ("instruction", "answer", "message"),
    [
        ("Which? Answer1: a Answer2: b", "answer1", "field 'instruction'.*'Answer format: label1/label2"),
        ("Which? Answer1: a\n\nAnswer format: answer1", "answer1", "field 'instruction'.*Answer format"),
        (
            "Which? Answer1: a Answer2: b\n\nAnswer format: answer1/answer2",
            "answer3",
            "field 'answer': 'answer3'.*answer1/answer2",
        ),
        (
            "Which? Answer1: a\n\nAnswer format: answer1/answer2",
            "answer1",
            "field 'instruction'.*'Answer2: …'",
        ),
        (
            "Which? Answer2: a Answer1: b\n\nAnswer format: answer1/answer2",
            "answer1",
            "field 'instruction'.*'Answer2: …'",
        ),
        (
            "Which? Answer1: Answer2: b\n\nAnswer format: answer1/answer2",
            "answer1",
            "field 'instruction'.*no text",
        ),
        ("Which?\n\nAnswer format: answer1/answer2", "answer1", "field 'instruction'.*'Answer1: …'"),
    ],
)
def test_malformed_question(instruction, answer, message):
    with pytest.raises(ValueError, match=message):
        parse(instruction, answer)


def test_doctests():
    assert doctest.testmod(commonsense) == (0, 2)


# --- examples and answers ---

ROW = {
    "instruction": WORDINGS["winogrande"][0],
    "input": "",
    "output": "the correct answer is option2",
    "answer": "option2",
}


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_label_format_shows_the_options(template, make_data):
    example = make_data(template=template, answer_format="label").example(ROW, "winogrande")
    assert ROW["instruction"] in example.prompt
    answers = ["the correct answer is option1", "the correct answer is option2"]
    assert [answer.strip() for answer in example.answers] == answers
    assert (example.gold, tuple(example.labels)) == (1, ("option1", "option2"))
    assert example.identity == ROW["instruction"]


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_content_format_hides_the_options(template, make_data):
    example = make_data(template=template, answer_format="content").example(ROW, "winogrande")
    if template == "plain":
        assert example.prompt == "Question: Sarah was better than Maria so _ got the easier cases.\nAnswer:"
    assert "Option1" not in example.prompt
    assert [answer.strip() for answer in example.answers] == ["Sarah", "Maria"]
    assert (example.gold, tuple(example.labels)) == (1, ("Sarah", "Maria"))
    assert example.identity == ROW["instruction"]


def test_label_format_parses_the_first_keyword(make_data):
    data = make_data(answer_format="label")
    labels = ["answer1", "answer2", "answer3"]
    texts = ("the correct answer is answer2", "so answer3, not answer1", "fridge")
    assert [data.parse_answer(text, labels).choice for text in texts] == [1, 2, None]
    assert data.parse_answer("It is false: not true.", ["true", "false"]) == ("false", 1)


def test_content_format_parses_the_first_line(make_data):
    data = make_data(answer_format="content")
    labels = ["in the fridge", "in the shed"]
    texts = (" In the shed.\nin the fridge", "in the shed or so", "answer1", "")
    assert [data.parse_answer(text, labels).choice for text in texts] == [1, None, None, None]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({name: value for name, value in ROW.items() if name != "instruction"}, "'instruction'"),
        ({name: value for name, value in ROW.items() if name != "answer"}, "'answer'"),
        (ROW | {"input": "more of the question"}, "'input' is 'more of the question'; expected nothing"),
        (ROW | {"answer": 1}, "'answer'"),
        (ROW | {"answer": "  "}, "'answer'"),
        (ROW | {"answer": "option3"}, "'answer': 'option3'"),
        (ROW | {"instruction": None}, "'instruction'"),
        (ROW | {"instruction": ["Which?"]}, "'instruction'"),
        (ROW | {"instruction": "Which? Answer1: a Answer2: b"}, "'instruction'"),
        ("just a text", "'instruction'"),
        ([1, 2], "'instruction'"),
        (None, "'instruction'"),
    ],
)
@pytest.mark.parametrize("answer_format", ["label", "content"])
def test_malformed_row(row, field, answer_format, make_data):
    with pytest.raises(ValueError, match=f"^field {field}"):
        make_data(answer_format=answer_format).example(row, "mine")


# --- sample data ---


@pytest.fixture(scope="module")
def sample_questions():
    """The parsed questions of each split."""
    return {
        split: [parse_question(row) for row in json.loads((SAMPLES / f"{split}.json").read_text())]
        for split in ("train", "validation", "test")
    }


def test_sample_is_the_default_source(make_data, sample_questions):
    data = make_data(answer_format="content")
    for split, count in (("train", 558), ("validation", 85), ("test", 144)):
        examples = list(data.examples(split))
        assert len(examples) == count
        assert {example.task for example in examples} == {"everyday"}
        expected = [question.options[question.gold] for question in sample_questions[split]]
        assert [example.answers[example.gold] for example in examples] == expected


def test_sample_splits_are_disjoint(sample_questions):
    questions = [question.question for split in sample_questions.values() for question in split]
    assert len(set(questions)) == len(questions) == 787


def test_sample_answers_are_balanced(sample_questions):
    """Always choosing the same position is right about as often as guessing."""
    for questions in sample_questions.values():
        for options in {len(question.options) for question in questions}:
            golds = Counter(question.gold for question in questions if len(question.options) == options)
            assert len(golds) == options
            assert max(golds.values()) - min(golds.values()) <= 5
