"""The user's own data: instructions and chats from every format, malformed rows, and the sample."""

import csv
import json
import re
from importlib import resources
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from chats import chat

from gatera_lightning.datamodules import InstructionDataModule
from gatera_lightning.datamodules.prompts.conversations import Chat, parse_conversation
from gatera_lightning.errors import ConfigError

SAMPLE = Path(str(resources.files("gatera_lightning.datamodules"))) / "samples" / "calendar"
INSTRUCTIONS = [
    {"instruction": "Translate into French.", "input": "good morning, all", "output": "bonjour à tous"},
    {"instruction": 'Say "hi", twice.', "input": "", "output": "hi\n\nhi"},
    {"instruction": "Wave;\tplease", "input": "two\nlines", "output": "👋"},
]
CHATS = [
    {"messages": chat("hi", "Hello 👋")},
    {
        "messages": chat(
            "user 0", "assistant 0", "user 1", "assistant 1", "user 2", "assistant 2", system="Be kind."
        )
    },
]
SUFFIXES = [".json", ".jsonl", ".csv", ".parquet"]


@pytest.fixture
def save(tmp_path):
    """``save("rows.csv", rows)`` writes a file in the format of its name and returns the path."""

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
        else:  # every row has every column, perhaps with null
            columns = dict.fromkeys(name for row in rows for name in row)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([columns | row for row in rows]), path)
        return str(path)

    return store


def error_of(data):
    """The error in the training rows."""
    with pytest.raises(ConfigError) as caught:
        list(data.examples("train"))
    return str(caught.value)


# --- examples ---


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
@pytest.mark.parametrize("kind", ["instructions", "chats"])
def test_all_formats_give_the_same_examples(kind, template, save, make_instruction_data, chat_tokenizers):
    rows, suffixes = (
        (INSTRUCTIONS, SUFFIXES) if kind == "instructions" else (CHATS, [".json", ".jsonl", ".parquet"])
    )
    if kind == "chats" and template == "alpaca":
        rows = rows[:1]  # the other one has several turns
    settings = {"template": template, "train_on": "every_response", "tokenizer": chat_tokenizers["gemma"]}
    first, *others = (
        list(make_instruction_data(train=[save(f"rows{suffix}", rows)], **settings).examples("train"))
        for suffix in suffixes
    )
    assert len(first) == len(rows)
    assert all(examples == first for examples in others)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_file_may_mix_instructions_and_chats(suffix, save, make_instruction_data):
    path = save(f"mixed{suffix}", [INSTRUCTIONS[0], CHATS[1], INSTRUCTIONS[1], CHATS[0]])
    examples = list(make_instruction_data(train=[path]).examples("train"))
    answers = [example.answers for example in examples]
    assert answers == [[" bonjour à tous"], [" assistant 2"], [" hi\n\nhi"], [" Hello 👋"]]
    beginnings = [example.prompt.partition(":")[0] for example in examples]
    assert beginnings == ["Question", "Be kind.\nUser", "Question", "User"]


@pytest.mark.parametrize(("template", "separator"), [("alpaca", ""), ("plain", " "), ("chat", "")])
def test_example_of_instruction(template, separator, save, make_instruction_data, chat_tokenizers):
    settings = {"template": template, "tokenizer": chat_tokenizers["turn_ends_in_eos"]}
    data = make_instruction_data(train=[save("my_notes.csv", INSTRUCTIONS[:2])], **settings)
    with_input, without_input = data.examples("train")
    assert "Translate into French." in with_input.prompt
    assert "good morning, all" in with_input.prompt
    assert 'Say "hi", twice.' in without_input.prompt
    assert "Input:" not in without_input.prompt
    assert with_input.answers == [f"{separator}bonjour à tous"]
    assert without_input.answers == [f"{separator}hi\n\nhi"]
    for example, label in ((with_input, "bonjour à tous"), (without_input, "hi\n\nhi")):
        assert example.labels == [label]
        assert (example.gold, example.task, example.chat) == (0, "my_notes", template == "chat")


def test_earlier_responses_are_located_for_every_response_only(save, make_instruction_data, chat_tokenizers):
    settings = {"template": "chat", "tokenizer": chat_tokenizers["llama3"]}
    source = [save("rows.json", CHATS[1:])]
    for train_on, count in (("every_response", 2), ("response", 0), ("all", 0)):
        (example,) = make_instruction_data(train=source, train_on=train_on, **settings).examples("train")
        assert len(example.earlier_responses) == count


def test_question_key_does_not_depend_on_template_and_length(chat_tokenizers, save, make_instruction_data):
    messages = chat("hi", "Hello.", "bye", "Bye!", system="Be kind.")
    rows = [{"messages": messages}, {"messages": messages[:3]}, {"instruction": "hi", "output": "hello."}]
    path, tokenizer = save("rows.json", rows), chat_tokenizers["gemma"]

    def keys(**settings):
        data = make_instruction_data(train=[path], tokenizer=tokenizer, **settings)
        return [example.key for example in data.examples("train")]

    found = keys(template="plain")
    assert len(set(found)) == 3
    assert found == keys(template="chat") == keys(template="plain", max_length=40)
    single_turn = save("chat.json", [{"messages": chat("Hi", "Hello.")}])
    (example,) = make_instruction_data(train=[single_turn]).examples("train")
    assert example.key == found[2]  # the same question as an instruction


@pytest.mark.parametrize(
    "other", [{"input": "3 4"}, {"input": ""}, {"output": "7"}, {"instruction": "Multiply."}]
)
def test_question_key_depends_on_every_column(other, save, make_instruction_data):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    first, second = make_instruction_data(train=[save("rows.json", [row, row | other])]).examples("train")
    assert first.key != second.key


# --- columns ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_of_other_names(suffix, save, make_instruction_data):
    names = {"instruction": "question", "input": "about", "output": "answer"}
    renamed = [
        {names[name]: text for name, text in row.items()} | {"instruction": "not this"}
        for row in INSTRUCTIONS
    ]
    data = make_instruction_data(train=[save(f"other{suffix}", renamed)], columns=names)
    expected = make_instruction_data(train=[save("rows.json", INSTRUCTIONS)])
    for one, other in zip(data.examples("train"), expected.examples("train"), strict=True):
        assert (one.prompt, one.answers, one.key) == (other.prompt, other.answers, other.key)


def test_messages_of_another_name(save, make_instruction_data):
    path = save("rows.parquet", [{"turns": CHATS[1]["messages"]}])
    (example,) = make_instruction_data(train=[path], columns={"messages": "turns"}).examples("train")
    assert example.answers == [" assistant 2"]


@pytest.mark.parametrize("column", ["input", "messages"])
def test_column_that_no_row_has_is_rejected(column, save, make_instruction_data):
    columns = {column: "contxt", "output": "output"}
    data = make_instruction_data(train=[save("rows.json", INSTRUCTIONS)], columns=columns)
    assert error_of(data) == f"data.columns: {column}: contxt, but no row of data.train has that column"


def test_columns_with_nearly_a_known_name_are_reported_once(save, make_instruction_data, caplog):
    rows = [row | {"system_prompt": "Be kind.", "inputs": "x", "source": "web"} for row in INSTRUCTIONS]
    data = make_instruction_data(train=[save("rows.json", rows)])
    for _ in range(2):
        list(data.examples("train"))
    assert [record.message for record in caplog.records] == [
        "column 'system_prompt' is not read; did you mean 'system'? "
        "To read it, set data.columns: {system: system_prompt}",
        "column 'inputs' is not read; did you mean 'input'? To read it, set data.columns: {input: inputs}",
    ]
    caplog.clear()
    columns = {"system": "system_prompt", "input": "inputs"}
    list(make_instruction_data(train=[save("rows.json", rows)], columns=columns).examples("train"))
    assert caplog.records == []


# --- settings ---


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        (
            "columns",
            {"instruction": "question", "promptt": "x", "response": "y"},
            "promptt, response is unknown; accepted: instruction, input, output, messages, system, history, "
            "conversations, tools, prompt, completion, text; did you mean 'prompt'?",
        ),
        (
            "rank_validation",
            True,
            "true, but every example has a single response, which always ranks first; accepted: false",
        ),
        (
            "train_on",
            "responses",
            "'responses' is unknown; accepted: response, every_response, all; did you mean 'response'?",
        ),
    ],
)
def test_problem_names_setting_value_and_accepted_values(setting, value, problem, make_instruction_data):
    assert make_instruction_data(**{setting: value}).problems("fit") == [f"data.{setting}: {problem}"]


def test_columns_are_optional(make_instruction_data):
    for columns in ({}, None):
        assert make_instruction_data(columns=columns).problems("fit") == []


def test_problems_are_found_before_any_row_is_read(save, make_instruction_data):
    data = make_instruction_data(
        train=[save("bad.jsonl", [{}]), "gone.csv"],
        validation=1,
        columns={"x": "y"},
        weights={"bad": 1, "gone": -2},
        template="vicuna",
    )
    problems = data.problems("fit")
    settings = [problem.partition(":")[0] for problem in problems]
    assert settings == ["data.template", "data.train", "data.weights", "data.columns"]
    assert problems[1] == "data.train: the file gone.csv does not exist"


@pytest.mark.parametrize("train_on", ["response", "every_response"])
def test_connect_rejects_chat_without_chat_template(train_on, make_instruction_data, tokenizers_by_kind):
    message = r"^data\.template: chat needs a tokenizer with a chat template"
    with pytest.raises(ConfigError, match=message):
        make_instruction_data(template="chat", tokenizer=tokenizers_by_kind["bos"], train_on=train_on)


def test_tokenizer_is_required():
    with pytest.raises(RuntimeError, match=r"call connect\(tokenizer\) first"):
        next(InstructionDataModule(template="plain", train_on="response").examples("train"))


# --- malformed rows ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_column_is_reported_with_the_existing_ones(suffix, save, make_instruction_data):
    path = save(f"rows{suffix}", [{"question": "Why?", "output": "So.", "id": "7"}] * 2)
    assert error_of(make_instruction_data(train=[f"{path}[1:]"])) == (
        f"{path}, row 2: column 'instruction' is missing; the row has question, output, id. "
        "To read another column, set data.columns: {instruction: NAME}"
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_without_response_are_skipped_and_counted(suffix, save, make_instruction_data, caplog):
    path = save(f"rows{suffix}", [*INSTRUCTIONS, INSTRUCTIONS[0] | {"output": " "}])
    data = make_instruction_data(train=[path])
    assert [example.labels[0] for example in data.examples("train")] == [
        row["output"] for row in INSTRUCTIONS
    ]
    assert (
        f"data.train: skipped 1 rows without a usable answer: {path}, row 4: column 'output'" in caplog.text
    )


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Why?", "output": None},
        {"messages": chat("hi", " \n")},
        {"messages": [*chat("hi"), {"role": "assistant", "content": "Hello.", "weight": 0}]},
        {"prompt": "Once", "completion": ""},
        {"text": " "},
    ],
)
def test_row_without_response_is_skipped_in_every_shape(row, write, make_instruction_data, caplog):
    rows = [row, INSTRUCTIONS[0]]
    assert len(list(make_instruction_data(train=[write("rows.json", rows)]).examples("train"))) == 1
    assert "skipped 1 rows" in caplog.text


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_chat_without_response_is_reported(suffix, save, make_instruction_data):
    path = save(f"rows{suffix}", [*CHATS, {"messages": CHATS[0]["messages"][:1]}])
    message = f"{path}, row 3: no message has role 'assistant'; expected at least one, the response"
    assert error_of(make_instruction_data(train=[path])) == message


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_messages_may_be_json_text(suffix, save, make_instruction_data):
    path = save(f"rows{suffix}", [{"messages": json.dumps(row["messages"])} for row in CHATS])
    expected = make_instruction_data(train=[save("rows.json", CHATS)]).examples("train")
    assert list(make_instruction_data(train=[path]).examples("train")) == list(expected)


def test_csv_without_header_shows_the_row_that_was_taken_for_it(save, make_instruction_data):
    path = Path(save("rows.csv", INSTRUCTIONS))
    path.write_text("Why?,So.\nHow?,Thus.\n")
    assert "the row has Why?, So." in error_of(make_instruction_data(train=[str(path)]))


def test_alpaca_rejects_chat_of_several_turns(save, make_instruction_data):
    path = save("rows.jsonl", CHATS)
    assert error_of(make_instruction_data(train=[path], template="alpaca")) == (
        f"{path}, row 2: template alpaca has a single turn, but the chat has 7 messages; "
        "accepted templates: chat, plain"
    )


def test_malformed_row_stops_the_fit(save, make_instruction_data):
    path = save("rows.jsonl", [*INSTRUCTIONS, INSTRUCTIONS[0] | {"input": [5]}])
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 4: column 'input': expected text, found \[5\]$"):
        make_instruction_data(train=[path], validation=1, stage="fit")


@pytest.mark.parametrize("content", ["[]", "", "\n \n", "instruction,output\n", "parquet"])
def test_empty_file_is_rejected(content, write, make_instruction_data, tmp_path):
    if content == "parquet":
        path = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"instruction": [""], "output": [""]}).slice(1), path)
    else:
        suffix = {"[]": "json", "instruction,output\n": "csv"}.get(content, "jsonl")
        path = write(f"rows.{suffix}", content)
    with pytest.raises(ConfigError, match=r"^data\.test: the split is empty"):
        make_instruction_data(test=[path], stage="test")


# --- sample data ---


def test_sample(make_instruction_data):
    data = make_instruction_data(train_on="every_response", stage="fit")
    data.setup("test")
    assert data.problems("fit") == data.problems("test") == []
    sizes = {split: len(table) for split, table in data.tables.items()}
    assert sizes == {"train": 120, "validation": 24, "test": 36}
    assert [overlap.indices for overlap in data.overlaps()] == [()] * 2
    for table in data.tables.values():
        assert not any(table["truncated"])
        assert set(table["task"]) == {"calendar"}


def test_sample_is_half_chats_and_splits_share_no_appointment():
    appointments = []
    for split in ("train", "validation", "test"):
        lines = (SAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [parse_conversation(json.loads(line), {}) for line in lines]
        assert sum(isinstance(conversation, Chat) for conversation in found) == len(found) // 2
        assert len({repr(conversation) for conversation in found}) == len(found)
        response = re.compile(r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) \d\d:\d\d · (.+?)(?: \(.+\))?")
        appointments.append({response.fullmatch(conversation.response)[1] for conversation in found})
    assert len(set.union(*appointments)) == sum(map(len, appointments))
