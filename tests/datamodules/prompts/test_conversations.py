"""Rows of the user's data as instructions and chats, and what an error says about other rows."""

import doctest
import math
import re

import pytest
from chats import chat

from gatera_lightning.datamodules.prompts import conversations
from gatera_lightning.datamodules.prompts.conversations import (
    Chat,
    Instruction,
    PlainText,
    parse_conversation,
)
from gatera_lightning.errors import ConfigError

HI = chat("hi", "Hello.", "bye", "Bye!", system="Be kind.")


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, {}, Instruction("Add.", "1 2", "3")),
        (
            {"instruction": " Add.\n", "input": "\t1 ", "output": "\n3 "},
            {},
            Instruction(" Add.\n", "\t1 ", "\n3 "),
        ),
        ({"instruction": "Sing.", "output": "La\n\nla"}, {}, Instruction("Sing.", "", "La\n\nla")),
        ({"instruction": "Sing.", "input": "", "output": "La"}, {}, Instruction("Sing.", "", "La")),
        ({"instruction": "Sing.", "input": " \n", "output": "La"}, {}, Instruction("Sing.", "", "La")),
        (
            {"instruction": "Sing.", "input": None, "output": "La", "messages": None, "id": 7},
            {},
            Instruction("Sing.", "", "La"),
        ),
        (
            {"question": "Why?", "reply": "So."},
            {"instruction": "question", "output": "reply"},
            Instruction("Why?", "", "So."),
        ),
        (
            {"input": "Why?", "instruction": "so", "output": "So."},
            {"instruction": "input", "input": "instruction"},
            Instruction("Why?", "so", "So."),
        ),
        ({"messages": HI}, {}, Chat(tuple(HI))),
        ({"messages": HI, "instruction": None, "input": None, "output": None}, {}, Chat(tuple(HI))),
        (
            {"turns": chat(" hi\n", "\tHello. ")},
            {"messages": "turns"},
            Chat(tuple(chat(" hi\n", "\tHello. "))),
        ),
        (
            {"messages": [message | {"name": "x"} for message in HI]},
            {},
            Chat(tuple(message | {"name": "x"} for message in HI)),
        ),
    ],
)
def test_parse_conversation(row, columns, expected):
    assert parse_conversation(row, columns) == expected


def test_chat_response_is_the_last_message():
    assert Chat(tuple(HI)).response == "Bye!"


RENAMED = {"instruction": "question", "output": "answer", "messages": "turns"}


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (["a"], {}, "expected an object with columns, found list"),
        (None, {}, "expected an object with columns, found NoneType"),
        (
            {"question": "Why?", "answer": "So."},
            {},
            "column 'instruction' is missing, and so is 'messages'; the row has question, answer. "
            "To read another column, set data.columns: {instruction: NAME}",
        ),
        (
            {"instruction": "Why?", "answer": "So."},
            {},
            "column 'output' is missing; the row has instruction, answer. "
            "To read another column, set data.columns: {output: NAME}",
        ),
        (
            {"instruction": "Why?", "output": "So."},
            RENAMED,
            "column 'question' is missing, and so is 'turns'; the row has instruction, output. "
            "To read another column, set data.columns: {instruction: NAME}",
        ),
        (
            {},
            {},
            "column 'instruction' is missing, and so is 'messages'; the row has no columns. "
            "To read another column, set data.columns: {instruction: NAME}",
        ),
        ({"instruction": "Why?", "output": ""}, {}, "column 'output' is empty"),
        ({"instruction": "Why?", "output": " \n"}, {}, "column 'output' is empty"),
        ({"instruction": "Why?", "output": None}, {}, "column 'output' is empty"),
        ({"instruction": None, "output": "So.", "messages": None}, {}, "column 'instruction' is empty"),
        ({"instruction": "\t", "output": "So."}, {}, "column 'instruction' is empty"),
        ({"question": "Why?", "answer": ""}, RENAMED, "column 'answer' is empty"),
        (
            {"question": "Why?", "answer": "So.", "turns": chat("hi", "Hello.")},
            RENAMED,
            "columns 'turns' and 'question': expected only one of the two",
        ),
        ({"instruction": True, "output": "So."}, {}, "column 'instruction': expected text, found True"),
        ({"instruction": "Why?", "output": ["So."]}, {}, "column 'output': expected text, found ['So.']"),
        ({"instruction": "Why?", "output": b"So."}, {}, "column 'output': expected text, found b'So.'"),
        (
            {"instruction": "?", "output": "So.", "input": math.nan},
            {},
            "column 'input': expected text, found nan",
        ),
        (
            {"question": "Why?", "answer": "So.", "about": {}},
            RENAMED | {"input": "about"},
            "column 'about': expected text, found {}",
        ),
    ],
)
def test_malformed_row(row, columns, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        parse_conversation(row, columns)
    assert str(caught.value) == message


NOT_MESSAGES = "messages: expected a list of objects with role and content, found "
UNKNOWN_ROLE = "is unknown; accepted: system, user, assistant, developer, tool"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("hi", f"{NOT_MESSAGES}'hi'"),
        ({"role": ["user"]}, f"{NOT_MESSAGES}{{'role': ['user']}}"),
        ([], f"{NOT_MESSAGES}[]"),
        (["hi", "Hello."], "message 1: expected an object with role and content, found 'hi'"),
        (
            [{"from": "human", "text": "hi"}],
            "message 1: expected an object with role and content, found from, text",
        ),
        ([*HI, {"role": "user"}], "message 6: expected an object with role and content, found role"),
        ([{"role": "human", "content": "hi"}], f"message 1: role 'human' {UNKNOWN_ROLE}"),
        ([*HI, {"role": None, "content": "hi"}], f"message 6: role None {UNKNOWN_ROLE}"),
        ([*HI, {"role": "user", "content": ""}], "message 6 (user): expected text as content, found ''"),
        (chat("hi", None), "message 2 (assistant): expected text as content, found None"),
        (chat(["hi"], "Hello."), "message 1 (user): expected text as content, found ['hi']"),
        ([*HI, HI[0], *HI[1:]], "message 6: only the first message may be a system message"),
        ([HI[0], *HI], "message 2: only the first message may be a system message"),
        (HI[:2], "no message has role 'assistant'; expected at least one, the response"),
        (HI[:1], "no message has role 'user'; expected at least one"),
        (
            [{"from": ["human"], "value": "hi"}],
            "message 1: from ['human'] is unknown; accepted: human, user, gpt, assistant, system, developer, "
            "tool, observation, function_call",
        ),
        ([HI[0], HI[2]], "no message has role 'user'; expected at least one"),
    ],
)
def test_malformed_messages(messages, error):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        parse_conversation({"messages": messages}, {})
    assert str(caught.value) == error


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "x" * 999},
        {"instruction": ["x" * 999], "output": "y"},
        {"messages": [{"x" * 999: 1}]},
    ],
)
def test_errors_show_the_beginning_of_long_values(row, make_instruction_data, write):
    with pytest.raises(ConfigError, match=r"rows\.json, row 1: ") as caught:
        list(make_instruction_data(train=[write("rows.json", [row])]).examples("train"))
    assert "x" * 50 in str(caught.value)
    assert str(caught.value).count("x") < 70


def test_doctests():
    assert doctest.testmod(conversations) == (0, 2)


CALL = {"name": "weather", "arguments": {"city": "Oslo"}}


def chat_with_call(arguments):
    call = {"role": "assistant", "content": None, "tool_calls": [CALL | {"arguments": arguments}]}
    return {"messages": [HI[1], call]}


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"instruction": "Why?", "output": "So.", "history": 5},
            "column 'history': expected a list of pairs",
        ),
        ({"instruction": "Why?", "output": "So.", "history": [5]}, "turn 1: expected a pair of texts"),
        (chat_with_call("{'city': 'Oslo'}"), "expected arguments of 'weather' as an object or JSON text"),
        (
            chat_with_call([1]),
            r"expected arguments of 'weather' as an object or JSON text of one, found \[1\]",
        ),
        (chat_with_call("7"), "expected arguments of 'weather' as an object"),
        (chat_with_call('{"city": "a", "city": "b"}'), "arguments: the key 'city' occurs twice"),
        (chat_with_call('{"city": "\\ud83d"}'), "half of a surrogate pair"),
        (chat_with_call({"city": "\ud83d"}), r"half of a character \(a lone surrogate\)"),
        ({**chat_with_call({}), "tools": '[{"name": "a", "name": "b"}]'}, "the key 'name' occurs twice"),
        ({**chat_with_call({}), "tools": [{"name": "a", "description": "\udc00"}]}, "lone surrogate"),
        ({**chat_with_call({}), "tools": "nonsense"}, "tools: expected a list of JSON schemas"),
        ({"messages": '[{"role": "user", "role": "user", "content": "a"}]'}, "key 'role' occurs twice"),
        ({"conversations": [{"from": {"a": 1}, "value": "hi"}]}, "from {'a': 1} is unknown"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, r"role \['user'\] is unknown"),
        ({"messages": []}, r"messages: expected a list of objects with role and content, found \[\]"),
    ],
    ids=lambda value: None if isinstance(value, dict) else re.sub(r"\W+", " ", value),
)
def test_malformed_values_inside_a_row(row, error):
    with pytest.raises(ValueError, match=error):
        parse_conversation(row, {})


def test_nulls_of_arguments_are_kept():
    for arguments in ({"city": None}, '{"city": null}'):
        (call,) = parse_conversation(chat_with_call(arguments), {}).messages[-1]["tool_calls"]
        assert call["function"]["arguments"] == {"city": None}


@pytest.mark.parametrize(
    "text", ["[1, 2, 3]", "[]", '["a"]', '[{"a": 1}, 2]', '[{"a": 1}]', '[{"a": 1, "a": 2}]', "[x]"]
)
def test_texts_that_look_like_lists_stay_texts(text):
    row = {"prompt": f"{text} sorted:", "completion": text}
    assert parse_conversation(row, {}) == PlainText(f"{text} sorted:", text)


@pytest.mark.parametrize("empty", [None, [], "", {}])
def test_empty_keys_mean_nothing(empty):
    turns = [{**message, "tool_calls": empty, "images": empty} for message in HI[1:3]]
    row = {"messages": turns, "conversations": [], "tools": empty or None, "history": []}
    assert [message["content"] for message in parse_conversation(row, {}).messages] == [
        message["content"] for message in HI[1:3]
    ]


def test_system_messages_and_results_may_be_empty():
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = [{"role": "system", "content": ""}, HI[1], call, {"role": "tool", "content": ""}, HI[2]]
    parsed = parse_conversation({"messages": messages}, {}).messages
    assert [message["content"] for message in parsed] == ["", HI[1]["content"], "", "", HI[2]["content"]]


def test_messages_that_nobody_answers_are_left_out():
    for row in (
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2
            + [{"from": "human", "value": "c"}]
        },
        {"messages": [*HI[:3], HI[1]]},
        {"prompt": HI[:2], "completion": [HI[2], HI[1]]},
    ):
        chat = parse_conversation(row, {})
        assert chat.unanswered
        assert chat.messages[-1]["role"] == "assistant"
    assert not parse_conversation({"messages": HI[:3]}, {}).unanswered
