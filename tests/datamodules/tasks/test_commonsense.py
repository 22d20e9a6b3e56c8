"""Commonsense rows: parsing, sources, messages about what is wrong with them, and the embedded sample."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from gatera_lightning.datamodules.tasks.commonsense import TASKS, parse_question
from gatera_lightning.errors import ConfigError

LEAD = "Please choose the correct answer to the question: "


def _parse(instruction, answer):
    question = parse_question({"instruction": instruction, "answer": answer})
    return question.question, question.labels, question.options, question.gold


# --- one literal row of each task's wording ---

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
        "Please choose the correct ending to complete the given sentence: Roof shingle removal: A man is on a roof. he\n\n"
        "Ending1: is using wrap. Ending2: is ripping tiles off. Ending3: is holding a cube. Ending4: starts pulling.\n\n"
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
        "Answer1: puppies learning Answer2: children growing up Answer3: flowers wilting Answer4: plants sprouting, wilting\n\n"
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
def test_wording_of_each_task(task):
    instruction, answer, expected = WORDINGS[task]
    assert _parse(instruction, answer) == expected


def test_every_published_task_has_a_wording_here():
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
def test_questions_that_look_like_options(question):
    instruction = f"{LEAD}{question}\n\nAnswer1: one Answer2: two\n\nAnswer format: answer1/answer2"
    assert _parse(instruction, "answer2") == (question, ("answer1", "answer2"), ("one", "two"), 1)


def test_more_than_nine_options():
    labels = [f"answer{k}" for k in range(1, 12)]
    options = " ".join(f"Answer{k}: thing{k}" for k in range(1, 12))
    parsed = _parse(f"{LEAD}Which?\n\n{options}\n\nAnswer format: {'/'.join(labels)}", "answer11")
    assert parsed[2:] == (tuple(f"thing{k}" for k in range(1, 12)), 10)


def test_a_question_without_lead_in_is_kept():
    assert (
        _parse("Why: this?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "answer1")[0]
        == "Why: this?"
    )


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
def test_rows_that_cannot_be_parsed(instruction, answer, message):
    with pytest.raises(ValueError, match=message):
        _parse(instruction, answer)


# --- real rows ---


def _bare(text):
    return "".join(text.split())


REAL_FILES = [
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


@pytest.mark.parametrize(("task", "split"), REAL_FILES)
def test_real_rows_lose_nothing(task, split, real_data):
    """Question, options and labels put together again are the row's instruction, but for its lead-in and white space."""
    counts = Counter()
    for row in json.loads((real_data / task / f"{split}.json").read_text()):
        parsed = parse_question(row)
        options = (
            ""
            if task == "boolq"
            else "".join(f"{a.title()}:{b}" for a, b in zip(parsed.labels, parsed.options, strict=True))
        )
        rebuilt = _bare(f"{parsed.question}{options}Answer format:{'/'.join(parsed.labels)}")
        lead, rest = _bare(row["instruction"])[: -len(rebuilt)], _bare(row["instruction"])[-len(rebuilt) :]
        assert rest == rebuilt
        assert re.fullmatch(r"Please(choose|answer)[a-z,]+:", lead)
        assert parsed.labels[parsed.gold] == row["answer"]
        assert row["output"] == f"the correct answer is {parsed.labels[parsed.gold]}"
        counts[len(parsed.options)] += 1
    assert set(counts) <= OPTION_COUNTS.get(task, {3, 4, 5})
    assert counts.most_common(1)[0][0] == max(OPTION_COUNTS.get(task, {4}))


def test_real_counts_of_options(real_data):
    """By hand: ``grep -c`` of the Answer format lines."""
    rows = json.loads((real_data / "ARC-Easy" / "train.json").read_text())
    assert Counter(len(parse_question(row).options) for row in rows) == {4: 2241, 3: 6, 5: 4}


LABELS = {  # as published
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
    "winogrande": ["option1", "option2"],
    **{task: [f"answer{n}" for n in range(1, 6)] for task in ("ARC-Easy", "ARC-Challenge", "openbookqa")},
}


@pytest.mark.parametrize("task", LABELS)
def test_real_rows_in_the_table(task, real_data, make_data, tokenizers_by_kind):
    """Labels, characters and gold of both answer formats, from the text of the row alone."""
    real = json.loads((real_data / task / "test.json").read_text())[:40]
    settings = {
        "tokenizer": tokenizers_by_kind["words"],
        "test": [f"{task}[:40]"],
        "data_dir": str(real_data),
    }
    label, content = (make_data(answer_format=how, stage="test", **settings) for how in ("label", "content"))
    assert len(label.tables["test"]) == len(content.tables["test"]) == len(real)
    for row, asked, told in zip(real, label.tables["test"], content.tables["test"], strict=True):
        names = row["instruction"].split("Answer format:")[1].strip().split("/")
        assert names == LABELS[task][: len(names)]
        body = re.sub(r"\s*Answer format:.*", "", row["instruction"], flags=re.DOTALL)
        texts = [
            t.strip() for t in re.split("|".join(f"{name.title()}:" for name in names), body)[1:]
        ] or names
        assert len(texts) == len(names)
        assert asked["labels"] == names
        assert asked["characters"] == [len(f"the correct answer is {name}") for name in names]
        assert told["labels"] == texts
        assert told["characters"] == [len(text) for text in texts]
        assert asked["gold"] == told["gold"] == names.index(row["answer"])
        assert asked["task"] == told["task"] == task
        assert asked["key"] == told["key"]
        assert label.read_answer(row["output"], asked["labels"]).choice == asked["gold"]
        if len({text.casefold() for text in texts}) == len(texts):
            assert content.read_answer(f" {texts[told['gold']]}\n", told["labels"]).choice == told["gold"]


def test_real_data_by_task_name_and_variable(real_data, make_data):
    sources = ["ARC-Easy[:3]", "boolq[:2]"]
    data = make_data(
        data_dir="$GATERA_DATA/commonsense", train=sources, validation=1, answer_format="content"
    )
    assert data.problems("fit") == []
    found = list(data.examples("train"))
    assert [example.task for example in found] == ["ARC-Easy"] * 3 + ["boolq"] * 2
    assert [len(example.answers) for example in found] == [4, 4, 4, 2, 2]


# --- prompts of both answer formats ---


def _example(make_data, write, **settings):
    instruction, answer, _ = WORDINGS["winogrande"]
    row = {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
    (example,) = make_data(train=[write("row.json", [row])], **settings).examples("train")
    return example


def test_label_prompts_show_the_whole_instruction(make_data, write):
    example = _example(make_data, write, template="plain", answer_format="label")
    assert example.prompt == f"Question: {WORDINGS['winogrande'][0]}\nAnswer:"
    assert example.answers == [" the correct answer is option1", " the correct answer is option2"]
    assert example.gold == 1


def test_content_prompts_leave_the_options_out(make_data, write):
    example = _example(make_data, write, template="plain", answer_format="content")
    assert example.prompt == "Question: Sarah was better than Maria so _ got the easier cases.\nAnswer:"
    assert example.answers == [" Sarah", " Maria"]
    assert example.gold == 1


# --- the answer in generated text ---


def test_labels_are_read_as_published(make_data):
    """The first keyword, wherever it stands."""
    data = make_data(answer_format="label")
    labels = ["answer1", "answer2", "answer3"]
    texts = ("the correct answer is answer2", "so answer3, not answer1", "fridge")
    found = [data.read_answer(text, labels).choice for text in texts]
    assert found == [1, 2, None]
    assert data.read_answer("It is false: not true.", ["true", "false"]) == ("false", 1)


def test_contents_are_read_as_the_whole_first_line(make_data):
    data = make_data(answer_format="content")
    labels = ["in the fridge", "in the shed"]
    texts = (" In the shed.\nin the fridge", "in the shed or so", "answer1", "")
    found = [data.read_answer(text, labels).choice for text in texts]
    assert found == [1, None, None, None]


@pytest.mark.parametrize(
    ("answer_format", "labels"), [("label", ("option1", "option2")), ("content", ("Sarah", "Maria"))]
)
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_an_example_is_recognised_by_labels_or_texts(template, answer_format, labels, make_data, write):
    example = _example(make_data, write, template=template, answer_format=answer_format)
    assert tuple(example.labels) == labels
    assert example.identity == WORDINGS["winogrande"][0]


# --- malformed files: what the message says ---

GOOD = {
    "instruction": f"{LEAD}Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
    "input": "",
    "output": "the correct answer is answer1",
    "answer": "answer1",
}


def _without(field):
    return {name: value for name, value in GOOD.items() if name != field}


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (_without("instruction"), "'instruction'"),
        (GOOD | {"input": "more of the question"}, "'input'"),
        (_without("answer"), "'answer'"),
        (GOOD | {"answer": 1}, "'answer'"),
        (GOOD | {"instruction": None}, "'instruction'"),
        (GOOD | {"instruction": ["Which?"]}, "'instruction'"),
        (GOOD | {"answer": "  "}, "'answer'"),
        (GOOD | {"answer": "answer3"}, "'answer': 'answer3'"),
        (GOOD | {"instruction": "Which? Answer1: a Answer2: b"}, "'instruction'"),
        ("just a text", "'instruction'"),
        ([1, 2], "'instruction'"),
        (None, "'instruction'"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_bad_row_is_named_by_file_row_and_field(bad, field, suffix, make_data, write):
    rows = [GOOD, bad, GOOD]
    content = rows if suffix == "json" else "\n".join(json.dumps(row) for row in rows)
    path = write(f"bad.{suffix}", content)
    with pytest.raises(ConfigError) as caught:
        list(make_data(train=[path]).examples("train"))
    assert f"{path}, row 2: field {field}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "bad.json",
            '[\n {"instruction": "a",\n  "output" "b"}\n]',
            r"bad\.json: not JSON \(.*line 3, column 12\)",
        ),
        ("cut.json", '[{"instruction": "a"', r"cut\.json: not JSON \(.*line 1"),
        ("empty.json", "", r"empty\.json: not JSON"),
        ("dict.json", '{"rows": []}', r"dict\.json: expected a JSON list of rows, found dict"),
        ("text.json", '"rows"', r"text\.json: expected a JSON list of rows, found str"),
        ("bad.jsonl", json.dumps(GOOD) + '\n{"instruction": \n', r"bad\.jsonl, row 2: not JSON \(.*column"),
    ],
)
def test_a_file_that_is_no_json(name, content, message, make_data, write):
    with pytest.raises(ConfigError, match=message):
        list(make_data(train=[write(name, content)]).examples("train"))


def test_a_file_in_another_encoding_is_named(make_data, tmp_path):
    path = tmp_path / "latin.json"
    path.write_bytes(json.dumps([GOOD | {"input": "café"}], ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.json"):
        list(make_data(train=[str(path)]).examples("train"))


def test_json_lines_skip_blank_lines_and_count_them(make_data, write):
    content = f"{json.dumps(GOOD)}\n\n{json.dumps(_without('answer'))}\n"
    path = write("rows.jsonl", content)
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 3: field 'answer'"):
        list(make_data(train=[path]).examples("train"))
    assert len(list(make_data(train=[f"{path}[:1]"]).examples("train"))) == 1


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_json_lines_end_at_newlines_only(separator, make_data, write):
    """These characters are legal inside a JSON text, and ``str.splitlines`` breaks at them."""
    row = GOOD | {"instruction": GOOD["instruction"].replace("Which?", f"Which{separator}one?")}
    content = "\n".join(json.dumps(r, ensure_ascii=False) for r in [row, row])
    examples = list(
        make_data(train=[write("rows.jsonl", content)], answer_format="content").examples("train")
    )
    assert len(examples) == 2
    assert f"Which{separator}one?" in examples[0].prompt


def test_json_lines_with_windows_line_ends(make_data, write):
    content = f"{json.dumps(GOOD)}\r\n{json.dumps(GOOD)}\r\n"
    assert len(list(make_data(train=[write("rows.jsonl", content)]).examples("train"))) == 2


@pytest.mark.parametrize(("sources", "count"), [("{}[:3]", 3), ("{}[:99]", 7), ("{}", 7), ("{}[:1]", 1)])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_slices_take_the_first_rows(sources, count, suffix, make_data, write, rows):
    content = rows(7) if suffix == "json" else "\n".join(json.dumps(row) for row in rows(7))
    data = make_data(train=[sources.format(write(f"rows.{suffix}", content))])
    assert [e.prompt.count(f"number {i}?") for i, e in enumerate(data.examples("train"))] == [1] * count


def test_a_slice_does_not_look_at_later_rows(make_data, write):
    assert (
        len(list(make_data(train=[write("rows.json", [GOOD, GOOD, None]) + "[:2]"]).examples("train"))) == 2
    )


def test_sources_follow_each_other(make_data, write, rows):
    sources = [write("one.json", rows(3)) + "[:2]", write("two.json", rows(5)[3:])]
    data = make_data(train=sources, stage="fit", validation=1)
    ids = sorted(data.tables["train"]["example"][:] + data.tables["validation"]["example"][:])
    assert ids == [0, 1, 2, 3]


@pytest.mark.parametrize("content", [[], None])
def test_an_empty_split(content, make_data, write):
    sources = [] if content is None else [write("empty.json", content)]
    with pytest.raises(ConfigError, match=r"data\.train: the split is empty"):
        make_data(train=sources, validation=sources, stage="fit")


# --- sources that are not there ---


def test_unknown_task_lists_the_known_ones(make_data):
    (problem,) = make_data(train=["ARC-Esay"], validation=1).problems("fit")
    assert problem.startswith("data.train: task 'ARC-Esay' is unknown")
    assert all(task in problem for task in TASKS)
    assert ".json" in problem
    assert "owner/name" in problem


def test_missing_task_says_what_the_folder_holds(make_data, write, tmp_path):
    write("ARC-Easy/train.json", [GOOD])
    write("boolq/test.json", [GOOD])
    write("notes.txt", "not a task")
    folder = tmp_path / "data"
    data = make_data(train=["ARC-Easy", "boolq"], validation=1, data_dir=str(folder))
    (problem,) = data.problems("fit")
    assert problem.startswith("data.train: task 'boolq'")
    assert str(folder / "boolq" / "train.json") in problem
    assert problem.endswith(f"{folder} holds ARC-Easy, boolq")


def test_missing_data_folder(make_data, tmp_path):
    (problem,) = make_data(train=["boolq"], validation=1, data_dir=str(tmp_path / "nowhere")).problems("fit")
    assert str(tmp_path / "nowhere" / "boolq" / "train.json") in problem
    assert problem.endswith("no task folders")


def test_missing_file_is_named(make_data, tmp_path):
    path = str(tmp_path / "gone.jsonl")
    assert make_data(train=[f"{path}[:5]"], validation=1).problems("fit") == [
        f"data.train: the file {path} does not exist"
    ]


def test_variables_are_expanded(make_data, write, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_DATA", str(tmp_path / "data"))
    write("boolq/train.json", [GOOD])
    write("mine.jsonl", json.dumps(GOOD))
    data = make_data(
        train=["boolq", "$MY_DATA/mine.jsonl", "${MY_DATA}/boolq/train.json"],
        validation=1,
        data_dir="$MY_DATA",
    )
    assert data.problems("fit") == []
    assert len(list(data.examples("train"))) == 3


def test_hub_without_network_says_what_to_do(make_data):
    data = make_data(train=["zwhe99/commonsense_170k[:10]"], validation=1)
    assert data.problems("fit") == []
    with pytest.raises(ConfigError) as caught:
        data.setup("fit")
    message = str(caught.value)
    assert message.startswith("data.train: cannot fetch 'zwhe99/commonsense_170k' from the hub (")
    assert "Without network, give local files." in message


@pytest.mark.parametrize(
    "error", [ConnectionError(), ConnectionError("\nno route"), OSError("no route\nmore")]
)
def test_hub_errors_of_any_text(error, make_data, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ConfigError, match=f"data.train: cannot fetch 'owner/name'.*{type(error).__name__}"):
        list(make_data(train=["owner/name"]).examples("train"))


def test_hub_rows_are_rows(make_data, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *names, split: asked.append((*names, split)) or [GOOD, GOOD, None]
    )
    assert [e.task for e in make_data(train=["owner/name[:2]"]).examples("train")] == ["name", "name"]
    assert asked == [("owner/name", None, "train")]
    with pytest.raises(ConfigError, match=r"owner/name\[train\], row 3: field 'instruction'"):
        list(make_data(train=["owner/name"]).examples("train"))


# --- problems: all at once ---


def test_all_problems_at_once(make_data):
    data = make_data(
        template="vicuna",
        answer_format="letter",
        train_on="prompt",
        max_length=0,
        batch_size=0,
        eval_batch_size=-1,
        token_budget=0,
        evaluate_by=["guessing"],
        train=["nope", "/gone.json"],
        validation=["boolq"],
        test=["neither"],
    )
    settings = [problem.split(":")[0] for problem in data.problems("fit")]
    assert sorted(settings) == sorted(
        f"data.{name}"
        for name in (
            *(
                "template",
                "answer_format",
                "train_on",
                "max_length",
                "batch_size",
                "eval_batch_size",
                "token_budget",
            ),
            *("evaluate_by", "train", "train", "validation"),
        )
    )


@pytest.mark.parametrize(
    ("setting", "value", "accepted"),
    [
        ("template", "vicuna", "alpaca, plain, chat"),
        ("answer_format", "letter", "label, content"),
        ("train_on", "prompt", "response, all"),
        ("max_length", 0, "at least 1"),
        ("token_budget", -5, "null, or an integer of at least 1"),
        *(
            ("validation", value, "sources, an integer of at least 1, or a share between 0 and 1")
            for value in (0, -3, 0.0, 1.0, 1.5, -0.1, float("nan"), True, False)
        ),
        *(
            ("evaluate_by", value, "a list of likelihood and generation, each at most once")
            for value in ([], ["ranking"], ["likelihood", "ranking"], ["likelihood", "likelihood"])
        ),
    ],
)
def test_a_problem_names_setting_value_and_what_is_accepted(setting, value, accepted, make_data):
    (problem,) = make_data(**{setting: value}).problems("fit")
    assert problem.startswith(f"data.{setting}: ")
    assert str(value) in problem
    assert accepted in problem


@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        ("fit", {"train", "validation"}),
        ("validate", {"validation"}),
        ("test", {"test"}),
        ("predict", {"test"}),
    ],
)
def test_only_the_sources_of_a_stage_are_required(stage, missing, make_data):
    data = make_data(train=["/a.json"], validation=["/b.json"], test=["/c.json"])
    assert {problem.split(":")[0] for problem in data.problems(stage)} == {
        f"data.{split}" for split in missing
    }


def test_held_out_rows_need_no_validation_sources(make_data):
    data = make_data(train=["/a.json"], validation=5, data_dir="/nowhere")
    assert [problem.split(":")[0] for problem in data.problems("validate")] == ["data.train"]


@pytest.mark.parametrize("value", [1, 7, 0.1, 0.999, 1e-9])
def test_rows_or_a_share_to_hold_out(value, make_data):
    for stage in ("fit", "validate"):
        assert make_data(validation=value).problems(stage) == []


@pytest.mark.parametrize("value", [["likelihood"], ["generation"], ["generation", "likelihood"]])
def test_ways_of_evaluating(value, make_data):
    assert make_data(evaluate_by=value).problems("test") == []


def test_no_source_says_what_is_accepted(make_data, tmp_path):
    data = make_data(data_dir=str(tmp_path))
    accepted = "no source given; accepted: a list of task names, files or hub ids"
    assert data.problems("fit") == [
        f"data.train: {accepted}",
        f"data.validation: {accepted}, or a number of rows to hold out of training",
    ]


def test_beside_rows_of_ones_own_no_sample_is_taken_unasked(make_data):
    """The best checkpoint would be the best at other questions."""
    data = make_data(train=["/mine.json"])
    assert [problem.split(":")[0] for problem in data.problems("fit")] == ["data.train", "data.validation"]
    assert [problem.split(":")[0] for problem in data.problems("test")] == ["data.test"]


def test_defaults_are_in_order(make_data):
    for stage in ("fit", "validate", "test", "predict"):
        assert make_data().problems(stage) == []


# --- rows held out of training ---


def _ids(data, split):
    return data.tables[split]["example"][:]


def test_held_out_rows_are_as_many_and_disjoint(make_data, write, rows):
    data = make_data(train=[write("rows.json", rows(20))], validation=6, stage="fit")
    train, held_out = _ids(data, "train"), _ids(data, "validation")
    assert len(held_out) == 6
    assert sorted(train + held_out) == list(range(20))


def test_held_out_rows_depend_on_the_seed_alone(make_data, write, rows):
    source = write("rows.json", rows(20))
    held_out = [
        _ids(make_data(train=[source], validation=6, seed=seed, stage=stage), "validation")
        for seed, stage in ((1, "fit"), (1, "validate"), (2, "fit"))
    ]
    assert held_out[0] == held_out[1] != held_out[2]


def test_set_up_twice_holds_out_once(make_data, write, rows):
    data = make_data(train=[write("rows.json", rows(20))], validation=6, stage="validate")
    data.setup("fit")
    data.setup("fit")
    assert (len(data.tables["train"]), len(data.tables["validation"])) == (14, 6)


@pytest.mark.parametrize(
    ("share", "rows_in", "held_out"),
    [(0.1, 20, 2), (0.3, 20, 6), (0.5, 4, 2), (0.1, 3, 1), (1e-9, 2, 1), (0.9, 10, 9)],
)
def test_a_share_is_rounded_and_at_least_one_row(share, rows_in, held_out, make_data, write, rows):
    data = make_data(train=[write("rows.json", rows(rows_in))], validation=share, stage="fit")
    assert (len(_ids(data, "train")), len(_ids(data, "validation"))) == (rows_in - held_out, held_out)
    assert sorted(_ids(data, "train") + _ids(data, "validation")) == list(range(rows_in))


def test_a_share_holds_out_the_rows_that_their_number_does(make_data, write, rows):
    source = [write("rows.json", rows(20))]
    assert _ids(make_data(train=source, validation=0.1, stage="fit"), "validation") == _ids(
        make_data(train=source, validation=2, stage="fit"), "validation"
    )


@pytest.mark.parametrize("held_out", [5, 6, 0.95])
def test_holding_out_everything(held_out, make_data, write, rows):
    with pytest.raises(
        ConfigError, match=f"^data.validation: {held_out} held out of 5 rows leave none to train on$"
    ):
        make_data(train=[write("rows.json", rows(5))], validation=held_out, stage="fit")


# --- the embedded sample ---


@pytest.fixture(scope="module")
def everyday():
    """Parsed rows by split, read from the installed package's folder."""
    import gatera_lightning.datamodules as package

    folder = Path(package.__file__).parent / "samples" / "everyday"
    splits = ("train", "validation", "test")
    return {
        split: [parse_question(row) for row in json.loads((folder / f"{split}.json").read_text())]
        for split in splits
    }


def test_the_sample_through_the_data_module(make_data, everyday):
    data = make_data(answer_format="content")
    for split, count in (("train", 558), ("validation", 85), ("test", 144)):
        examples = list(data.examples(split))
        assert len(examples) == count
        assert {example.task for example in examples} == {"everyday"}
        assert [example.answers[example.gold] for example in examples] == [
            q.options[q.gold] for q in everyday[split]
        ]


def test_sample_splits_are_disjoint(everyday):
    questions = [question.question for split in everyday.values() for question in split]
    assert len(set(questions)) == len(questions) == 787


def test_sample_golds_are_balanced(everyday):
    """Whoever always gives the same position is right as often as chance, give or take four rows."""
    for split in everyday.values():
        for options in {len(question.options) for question in split}:
            golds = Counter(question.gold for question in split if len(question.options) == options)
            assert len(golds) == options
            assert max(golds.values()) - min(golds.values()) <= 5


def test_prepare_data_reads_what_the_stage_needs(make_data, write, rows, token_cache):
    sources = {
        split: [write(f"{split}.json", rows(count))]
        for split, count in (("train", 3), ("validation", 4), ("test", 5))
    }
    data = make_data(**sources)
    data.trainer.state = SimpleNamespace(fn=SimpleNamespace(value="test"))
    data.prepare_data()
    assert len(list(token_cache.glob("*.arrow"))) == 1
    data.trainer.state = SimpleNamespace(fn=SimpleNamespace(value="fit"))
    data.prepare_data()
    assert len(list(token_cache.glob("*.arrow"))) == 3
