"""People's own data: the same rows from every format, what is refused and how, the sample, and a run on it."""

import csv
import json
import re
import shutil
from importlib import resources
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_backbone import tiny_args

from gatera_lightning.cli.main import main
from gatera_lightning.datamodules import InstructionDataModule
from gatera_lightning.datamodules.prompts.conversations import Chat, parse_conversation
from gatera_lightning.errors import ConfigError

SAMPLE = Path(str(resources.files("gatera_lightning.datamodules"))) / "samples" / "calendar"
NOTES = [
    {"instruction": "Translate into French.", "input": "good morning, all", "output": "bonjour à tous"},
    {"instruction": 'Say "hi", twice.', "input": "", "output": "hi\n\nhi"},
    {"instruction": "Wave;\tplease", "input": "two\nlines", "output": "👋"},
]
CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello 👋"}]},
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            *({"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")),
        ]
    },
]


@pytest.fixture
def save(tmp_path):
    """``save("rows.csv", rows)``: the path of a file with these rows, in the format of its name."""

    def store(name, rows):
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(rows))
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        elif path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            columns = dict.fromkeys(name for row in rows for name in row)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([columns | row for row in rows]), path)
        return str(path)

    return store


def _problem(data, split="train"):
    """What is said of the rows of a split."""
    with pytest.raises(ConfigError) as caught:
        list(data.examples(split))
    return str(caught.value)


# --- the same rows, however they are written ---


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
@pytest.mark.parametrize(
    ("rows", "suffixes"),
    [(NOTES, (".json", ".jsonl", ".csv", ".parquet")), (CHATS, (".json", ".jsonl", ".parquet"))],
    ids=["notes", "chats"],
)
def test_every_format_gives_the_same_examples(
    rows, suffixes, template, save, make_instruction_data, chat_tokenizers
):
    if template == "alpaca":
        rows = rows[:1] if "messages" in rows[0] else rows
    settings = {"template": template, "train_on": "every_response", "tokenizer": chat_tokenizers["gemma"]}
    found = [
        list(make_instruction_data(train=[save(f"rows{suffix}", rows)], **settings).examples("train"))
        for suffix in suffixes
    ]
    assert len(found[0]) == len(rows)
    assert all(examples == found[0] for examples in found[1:])


def test_both_kinds_of_rows_in_one_file(save, make_instruction_data):
    """Parquet gives every row every column, with nothing in it."""
    rows = [NOTES[0], CHATS[1], NOTES[1], CHATS[0]]
    for suffix in (".json", ".jsonl", ".parquet"):
        examples = list(make_instruction_data(train=[save(f"mixed{suffix}", rows)]).examples("train"))
        assert [example.answers for example in examples] == [
            [" bonjour à tous"],
            [" assistant 2"],
            [" hi\n\nhi"],
            [" Hello 👋"],
        ]
        assert [example.prompt.partition(":")[0] for example in examples] == [
            "Question",
            "Be kind.\nUser",
            "Question",
            "User",
        ]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_columns_of_other_names(suffix, save, make_instruction_data):
    names = {"instruction": "question", "input": "about", "output": "answer"}
    renamed = [
        {names[name]: text for name, text in row.items()} | {"instruction": "not this"} for row in NOTES
    ]
    data = make_instruction_data(train=[save(f"other{suffix}", renamed)], columns=names)
    expected = make_instruction_data(train=[save("rows.json", NOTES)])
    for one, other in zip(data.examples("train"), expected.examples("train"), strict=True):
        assert (one.prompt, one.answers, one.key) == (other.prompt, other.answers, other.key)


@pytest.mark.parametrize("column", ["input", "messages"])
def test_a_column_that_no_row_has_is_not_left_out_silently(column, save, make_instruction_data):
    data = make_instruction_data(
        train=[save("rows.json", NOTES)], columns={column: "contxt", "output": "output"}
    )
    with pytest.raises(
        ConfigError, match=rf"^data.columns: {column}: contxt, and no row of data.train has that column$"
    ):
        list(data.examples("train"))


def test_messages_of_another_name(save, make_instruction_data):
    data = make_instruction_data(
        train=[save("rows.parquet", [{"turns": CHATS[1]["messages"]}])], columns={"messages": "turns"}
    )
    (example,) = data.examples("train")
    assert example.answers == [" assistant 2"]


ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
WITH_INPUT = ", paired with an input that provides further context"
PROMPTS = {  # by hand: a note with an input, one without, and how an answer follows
    "alpaca": (
        ALPACA.format(WITH_INPUT, "Translate into French.\n\n### Input:\ngood morning, all"),
        ALPACA.format("", 'Say "hi", twice.'),
        "",
    ),
    "plain": (
        "Question: Translate into French.\n\ngood morning, all\nAnswer:",
        'Question: Say "hi", twice.\nAnswer:',
        " ",
    ),
    "chat": (
        "<im_start>user\nTranslate into French.\n\ngood morning, all<eos>\n<im_start>assistant\n",
        '<im_start>user\nSay "hi", twice.<eos>\n<im_start>assistant\n',
        "",
    ),
}


@pytest.mark.parametrize("template", PROMPTS)
def test_an_instruction_with_and_without_input(template, save, make_instruction_data, chat_tokenizers):
    settings = {"template": template, "tokenizer": chat_tokenizers["turn_ends_in_eos"]}
    examples = list(
        make_instruction_data(train=[save("my_notes.csv", NOTES[:2])], **settings).examples("train")
    )
    *prompts, space = PROMPTS[template]
    assert [example.prompt for example in examples] == prompts
    assert [example.answers for example in examples] == [[f"{space}bonjour à tous"], [f"{space}hi\n\nhi"]]
    assert [example.labels for example in examples] == [["bonjour à tous"], ["hi\n\nhi"]]
    assert {(example.gold, example.task, example.chat) for example in examples} == {
        (0, "my_notes", template == "chat")
    }


def test_places_of_earlier_responses_are_asked_for_with_every_response_alone(
    save, make_instruction_data, chat_tokenizers
):
    source = [save("rows.json", CHATS[1:])]
    for train_on, count in (("every_response", 2), ("response", 0), ("all", 0)):
        data = make_instruction_data(
            train=source, template="chat", tokenizer=chat_tokenizers["llama3"], train_on=train_on
        )
        (example,) = data.examples("train")
        assert len(example.earlier_responses) == count


# --- files under data_dir ---


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_task_may_have_any_format(suffix, save, make_instruction_data, make_data, tmp_path):
    save(f"calendar/train{suffix}", NOTES)
    save(f"calendar/test{'.json' if suffix == '.csv' else '.csv'}", NOTES[:2])
    settings = {"train": ["calendar"], "test": ["calendar"], "validation": 1, "data_dir": f"{tmp_path}/own/"}
    data = make_instruction_data(**settings)
    assert data.problems("fit") == data.problems("test") == []
    assert [len(list(data.examples(split))) for split in ("train", "test")] == [3, 2]
    assert {example.task for example in data.examples("train")} == {"calendar"}


def test_a_task_without_any_file(make_instruction_data, tmp_path):
    (problem,) = make_instruction_data(train=["calendar"], validation=1, data_dir=str(tmp_path)).problems(
        "fit"
    )
    assert problem.startswith(f"data.train: task 'calendar' needs the file {tmp_path}/calendar/train.json")
    assert "does not exist" in problem


# --- settings that cannot work ---


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        (
            "columns",
            {"instruction": "question", "prompt": "x", "response": "y"},
            "data.columns: prompt, response is unknown; accepted: instruction, input, output, messages",
        ),
        (
            "rank_validation",
            True,
            "data.rank_validation: true, and a row has one response, which always ranks first; accepted: false",
        ),
        (
            "train_on",
            "responses",
            "data.train_on: 'responses' is unknown; accepted: response, every_response, all",
        ),
        ("train_on", None, "data.train_on: is not set; accepted: response, every_response, all"),
        ("template", "vicuna", "data.template: 'vicuna' is unknown; accepted: alpaca, plain, chat"),
    ],
)
def test_a_setting_that_cannot_work(setting, value, problem, make_instruction_data):
    assert make_instruction_data(**{setting: value}).problems("fit") == [problem]


def test_problems_come_at_once_and_before_any_row_is_read(save, make_instruction_data):
    bad = save("bad.jsonl", [{}])
    weights = {"bad": 1, "gone": -2}
    data = make_instruction_data(
        train=[bad, "gone.csv"], validation=1, columns={"x": "y"}, weights=weights, template="vicuna"
    )
    found = data.problems("fit")
    assert [problem.partition(":")[0] for problem in found] == [
        "data.template",
        "data.train",
        "data.weights",
        "data.columns",
    ]
    assert found[1] == "data.train: the file gone.csv does not exist"
    assert found[2] == "data.weights: gone: -2; accepted: a number of at least 0"


def test_a_file_that_holds_no_rows_by_its_name(write, make_instruction_data):
    problems = make_instruction_data(train=[write("notes.txt", "a note")], validation=1).problems("fit")
    assert [problem.partition(": ")[2].rpartition("' ")[2] for problem in problems] == [
        "is no file of rows; accepted: .jsonl, .json, .csv, .parquet"
    ]


def test_columns_may_be_left_out(make_instruction_data):
    assert (
        make_instruction_data(columns={}).problems("fit")
        == make_instruction_data(columns=None).problems("test")
        == []
    )


@pytest.mark.parametrize("train_on", ["response", "every_response"])
def test_chat_needs_a_template_in_the_tokenizer(train_on, make_instruction_data, tokenizers_by_kind):
    message = r"data\.template: chat needs a tokenizer with a chat template, and this one has none; use alpaca, plain$"
    with pytest.raises(ConfigError, match=message):
        make_instruction_data(template="chat", tokenizer=tokenizers_by_kind["bos"], train_on=train_on)


def test_a_tokenizer_is_needed():
    with pytest.raises(RuntimeError, match=r"call connect\(tokenizer\) first"):
        next(InstructionDataModule(template="plain", train_on="response").examples("train"))


# --- rows that cannot be used ---


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_missing_column_is_named_with_those_that_are_there(suffix, save, make_instruction_data):
    path = save(f"rows{suffix}", [{"question": "Why?", "output": "So.", "id": "7"}] * 2)
    assert _problem(make_instruction_data(train=[f"{path}[1:]"])) == (
        f"{path}, row 2: column 'instruction' is missing; the row has question, output, id. "
        "data.columns: {instruction: NAME} reads another one"
    )


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_an_empty_output_is_named_by_file_and_row(suffix, save, make_instruction_data):
    path = save(f"rows{suffix}", [*NOTES, NOTES[0] | {"output": " "}])
    assert _problem(make_instruction_data(train=[path])) == f"{path}, row 4: column 'output' is empty"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_chat_that_is_none_is_named_by_file_and_row(suffix, save, make_instruction_data):
    asked = {"messages": CHATS[0]["messages"][:1]}
    path = save(f"rows{suffix}", [*CHATS, asked])
    found = _problem(make_instruction_data(train=[path]))
    assert (
        found
        == f"{path}, row 3: the last message is the user's; expected the assistant's, which is the response"
    )


def test_a_chat_cannot_stand_in_csv(save, make_instruction_data):
    path = save("rows.csv", [{"messages": json.dumps(CHATS[0]["messages"])}])
    assert _problem(make_instruction_data(train=[path])).startswith(
        f"{path}, row 1: messages: expected a list of objects with role and content, found '[{{"
    )


def test_a_table_without_a_header_shows_what_was_taken_for_one(save, make_instruction_data):
    path = Path(save("rows.csv", NOTES))
    path.write_text("Why?,So.\nHow?,Thus.\n")
    assert "the row has Why?, So." in _problem(make_instruction_data(train=[str(path)]))


@pytest.mark.parametrize("number", range(2))
def test_alpaca_has_no_place_for_a_chat_of_several_turns(number, save, make_instruction_data):
    path = save("rows.jsonl", [*CHATS[:1] * number, CHATS[1]])
    assert _problem(make_instruction_data(train=[path], template="alpaca")) == (
        f"{path}, row {number + 1}: a chat of 7 messages; template alpaca has one turn: use chat or plain"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", "[]"), ("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", "instruction,output\n")],
)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_without_rows(name, content, split, write, save, make_instruction_data):
    full, empty = [save("full.json", NOTES)], [write(name, content)]
    settings = {"train": full, "validation": full, "test": full} | {split: empty}
    with pytest.raises(ConfigError, match=rf"^data\.{split}: the split is empty; give at least one example$"):
        make_instruction_data(stage="test" if split == "test" else "fit", **settings)


def test_a_slice_or_a_table_without_rows(save, make_instruction_data, tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"instruction": [""], "output": [""]}).slice(1), tmp_path / "none.parquet"
    )
    for source in (f"{save('rows.csv', NOTES)}[3:]", str(tmp_path / "none.parquet")):
        with pytest.raises(ConfigError, match=r"^data\.test: the split is empty; give at least one example$"):
            make_instruction_data(test=[source], stage="test")


def test_a_row_that_cannot_be_used_stops_the_fit(save, make_instruction_data):
    path = save("rows.jsonl", [*NOTES, NOTES[0] | {"input": 5}])
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 4: column 'input': expected a text, found 5$"):
        make_instruction_data(train=[path], validation=1, stage="fit")


# --- the sample ---


def _sample(split):
    return [json.loads(line) for line in (SAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_sample(make_instruction_data):
    data = make_instruction_data(template="plain", train_on="every_response", stage="fit")
    data.setup("test")
    assert data.problems("fit") == data.problems("test") == []
    assert {split: len(table) for split, table in data.tables.items()} == {
        "train": 120,
        "validation": 24,
        "test": 36,
    }
    assert [found.rows for found in data.overlaps()] == [()] * 2
    assert not any(any(table["truncated"]) for table in data.tables.values())
    assert {task for table in data.tables.values() for task in table["task"]} == {"calendar"}


def test_rows_of_the_sample_are_of_both_kinds_and_their_appointments_in_one_split_each():
    appointments = []
    for split in ("train", "validation", "test"):
        found = [parse_conversation(row, {}) for row in _sample(split)]
        assert sum(isinstance(conversation, Chat) for conversation in found) == len(found) // 2
        assert len({repr(conversation) for conversation in found}) == len(found)
        lines = [
            re.fullmatch(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun) \d\d:\d\d · (.+?)( \(.+\))?", c.response)
            for c in found
        ]
        appointments.append({line[2] for line in lines})
    assert len(set.union(*appointments)) == sum(map(len, appointments))


# --- a run ---


CHAT_TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}>\n{{ turn['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def test_the_recipe_trains_and_tests(tiny_backbone, tmp_path, monkeypatch, capsys):
    """With the chat template, every response and packed lines."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))
    rows = {"train": 48, "validation": 9, "test": 4}
    args = ["--config", "own_data.yaml", *tiny_args(folder), "--data.init_args.packing", "true"]
    args += [f"--data.init_args.{split}=['calendar[:{count}]']" for split, count in rows.items()]
    assert main(["fit", *args]) == 0
    (last,) = tmp_path.glob("runs/own_data/version_0/checkpoints/last")
    capsys.readouterr()
    args += ["--evaluation.folder", "results"]
    assert main(["test", *args, "--model.warm_start", str(last)]) == 0
    found = [
        json.loads(line) for line in (tmp_path / "results" / "predictions.jsonl").read_text().splitlines()
    ]
    assert [(row["task"], row["example"], row["gold"]) for row in found] == [
        ("calendar", number, 0) for number in range(4)
    ]
    assert all(row["likelihood"]["log_likelihoods"][0] < 0 for row in found)
    assert all(row["generation"]["reference"] and "token_f1" in row["generation"]["scores"] for row in found)
    said = capsys.readouterr().out
    assert "nats per token" in said
    assert "generated texts compared with their references" in said
    assert "accuracy" not in said
