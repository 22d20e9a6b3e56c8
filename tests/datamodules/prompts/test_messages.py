"""Messages as OpenAI, ShareGPT and Parquet files write them."""

import json

import pytest
from chats import chat

from gatera_lightning.datamodules.prompts.conversations import Chat, PlainText, parse_conversation
from gatera_lightning.datamodules.prompts.messages import EmptyResponseError, parse_messages

HI = chat("hi", "Hello.")
KIND = chat("hi", "Hello.", system="Be kind.")
CALL = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
ASKED = [*chat("hi"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
NULLS = {"name": None, "tool_calls": None, "weight": None, "refusal": None, "function_call": None}


def sharegpt(*senders_and_values):
    return [{"from": sender, "value": value} for sender, value in senders_and_values]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": sharegpt(("human", "hi"), ("gpt", "Hello."))}, Chat(tuple(HI))),
        (
            {"conversations": sharegpt(("system", "Be kind."), ("user", "hi"), ("assistant", "Hello."))},
            Chat(tuple(KIND)),
        ),
        ({"conversations": HI}, Chat(tuple(HI))),
        ({"messages": sharegpt(("human", "hi"), ("gpt", "Hello."))}, Chat(tuple(HI))),
        (
            {"conversations": sharegpt(("human", "hi"), ("gpt", "Hello.")), "system": "Be kind."},
            Chat(tuple(KIND)),
        ),
        ({"messages": HI, "system": " "}, Chat(tuple(HI))),
        ({"messages": [KIND[0] | {"role": "developer"}, *HI]}, Chat(tuple(KIND))),
        ({"messages": [message | NULLS for message in HI]}, Chat(tuple(HI))),
        ({"messages": json.dumps(HI)}, Chat(tuple(HI))),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "Hello.", "image_url": None}]},
                ]
            },
            Chat(tuple(HI)),
        ),
        ({"messages": chat(2, 5)}, Chat(tuple(chat("2", "5")))),
        # tools
        ({"messages": ASKED, "tools": TOOLS}, Chat(tuple(ASKED), tuple(TOOLS))),
        ({"messages": ASKED, "tools": json.dumps(TOOLS)}, Chat(tuple(ASKED), tuple(TOOLS))),
        ({"messages": HI, "tools": []}, Chat(tuple(HI))),
        ({"messages": HI, "tools": ""}, Chat(tuple(HI))),
        (
            {"messages": [*HI[:1], {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            Chat(tuple(ASKED)),
        ),
        ({"messages": [*HI[:1], {"role": "assistant", "tool_calls": [CALL]}]}, Chat(tuple(ASKED))),
        (
            {
                "messages": [
                    *HI[:1],
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"x": 1}'}}],
                    },
                ]
            },
            Chat(tuple(ASKED)),
        ),
        (
            {
                "conversations": [
                    *sharegpt(("human", "hi"), ("function_call", '{"name": "f", "arguments": {"x": 1}}')),
                    *sharegpt(("observation", "21"), ("gpt", "Hello.")),
                ]
            },
            Chat(
                (
                    HI[0],
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{k: CALL[k] for k in ("type", "function")}],
                    },
                    {"role": "tool", "content": "21"},
                    HI[1],
                )
            ),
        ),
        # thoughts and weights
        *(
            (
                {"messages": [HI[0], HI[1] | {key: "Hm."}]},
                Chat((HI[0], HI[1] | {"reasoning_content": "Hm."})),
            )
            for key in ("reasoning_content", "reasoning", "thinking")
        ),
        ({"messages": [HI[0] | {"weight": 0}, HI[1] | {"weight": 1}]}, Chat(tuple(HI))),
        ({"messages": [HI[0], HI[1] | {"weight": 1.0}]}, Chat(tuple(HI))),
        (
            {"messages": [HI[0], HI[1] | {"weight": 0}, *HI]},
            Chat((HI[0], HI[1] | {"weight": 0}, *HI)),
        ),
        ({"messages": [*HI, HI[0], HI[1] | {"weight": 0}]}, Chat(tuple(HI))),
        # who speaks first
        ({"messages": [HI[1], *HI]}, Chat((HI[1], *HI))),
        ({"messages": [KIND[0], HI[1], *HI]}, Chat((KIND[0], HI[1], *HI))),
        # other shapes
        ({"prompt": HI[:1], "completion": HI[1:]}, Chat(tuple(HI))),
        ({"prompt": KIND[:2], "completion": HI[1:], "tools": None}, Chat(tuple(KIND))),
        ({"prompt": "Once", "completion": " upon a time"}, PlainText("Once", " upon a time")),
        ({"text": " Once\n", "id": 7}, PlainText("", " Once\n")),
        ({"messages": HI, "prompt": "hi", "text": "all of it", "prompt_id": "x"}, Chat(tuple(HI))),
        (
            {"instruction": "hi", "output": "Hello.", "system": "Be kind.", "input": ""},
            Chat(tuple(KIND)),
        ),
        (
            {"instruction": "bye", "input": "now", "output": 5, "history": [["hi", "Hello."]]},
            Chat((*HI, *chat("bye\n\nnow", "5"))),
        ),
        ({"instruction": "hi", "output": "Hello.", "tools": TOOLS}, Chat(tuple(HI), tuple(TOOLS))),
    ],
)
def test_shapes_of_chats(row, expected):
    assert parse_conversation(row, {}) == expected


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"talk": HI}, {"conversations": "talk"}, Chat(tuple(HI))),
        ({"question": "hi", "reply": "Hello.", "rules": "Be kind."}, None, Chat(tuple(KIND))),
        ({"body": "Once"}, {"text": "body"}, PlainText("", "Once")),
    ],
)
def test_columns_of_other_names(row, columns, expected):
    names = {"instruction": "question", "output": "reply", "system": "rules"}
    assert parse_conversation(row, names if columns is None else columns) == expected


def test_renamed_column_has_no_other_meaning():
    """``prompt`` is read as the instruction, not as a text to complete."""
    row = {"prompt": "hi", "completion": "Hello."}
    found = parse_conversation(row, {"instruction": "prompt", "output": "completion"})
    assert (found.request, found.response) == ("hi", "Hello.")


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"messages": [HI[0] | {"contents": "x"}, HI[1]]},
            "message 1 (user): key 'contents' is unknown; accepted: role, content, name, weight, tool_calls, "
            "tool_call_id, reasoning_content, reasoning, thinking; did you mean 'content'?",
        ),
        ({"messages": [HI[0], HI[1] | {"train": False}]}, "message 2 (assistant): key 'train' is unknown"),
        (
            {"messages": [HI[0], HI[1] | {"role": "assistants"}]},
            "message 2: role 'assistants' is unknown; accepted: system, user, assistant, developer, tool; "
            "did you mean 'assistant'?",
        ),
        (
            {"conversations": sharegpt(("hunan", "hi"), ("gpt", "Hello."))},
            "message 1: from 'hunan' is unknown; accepted: human, user, gpt, assistant, system, developer, "
            "tool, observation, function_call; did you mean 'human'?",
        ),
        (
            {"conversations": [sharegpt(("human", "hi"))[0] | {"role": "user"}, *HI]},
            "message 1: expected role and content or from and value, found both",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, HI[1]]},
            "message 1 (user): a part of its content has 'image_url'; accepted: type 'text' with a text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "url": "y"}]}, HI[1]]},
            "message 1 (user): a part of its content has the keys text, type, url; accepted: type 'text'",
        ),
        ({"messages": chat({"text": "hi"}, "Hello.")}, "message 1 (user): expected text as content, found {"),
        ({"messages": chat(True, "Hello.")}, "message 1 (user): expected text as content, found True"),
        ({"messages": chat(float("inf"), "x")}, "message 1 (user): content: expected text, found inf"),
        ({"messages": [HI[0], HI[1] | {"weight": 0.5}]}, "message 2 (assistant): weight 0.5; accepted: 0, 1"),
        ({"messages": [HI[0], HI[1] | {"weight": "0"}]}, "message 2 (assistant): weight '0'; accepted: 0, 1"),
        (
            {"messages": [HI[0] | {"weight": 1}, HI[1]]},
            "message 1 (user): weight 1; accepted: 0, because only responses are trained on",
        ),
        (
            {"messages": [HI[0] | {"reasoning": "Hm."}, HI[1]]},
            "message 1 (user): reasoning_content; accepted in assistant messages only",
        ),
        (
            {"messages": [HI[0], HI[1] | {"tool_calls": [{"id": "c1"}]}]},
            "message 2 (assistant): expected tool_calls with a function's name, found {'id': 'c1'}",
        ),
        ({"messages": HI, "tools": "weather"}, "tools: expected a list of JSON schemas, found 'weather'"),
        (
            {"messages": HI, "tools": [{"type": "function"}]},
            "tools: tool 1 has no name; expected a JSON schema",
        ),
        ({"messages": HI, "conversations": HI}, "columns 'messages' and 'conversations': expected only one"),
        (
            {"messages": KIND, "system": "No."},
            "column 'system', and the first message is a system message too",
        ),
        ({"messages": HI, "system": ["No."]}, "column 'system': expected text, found ['No.']"),
        (
            {"messages": HI, "images": ["x.png"]},
            "column 'images': images, videos and sound are not supported",
        ),
        ({"messages": HI, "functions": [{}]}, "column 'functions': functions (give them as 'tools') are not"),
        (
            {"prompt": "hi", "chosen": "a", "rejected": "b"},
            "columns 'chosen' and 'rejected': pairs of responses",
        ),
        (
            {"prompt": HI[:1], "completion": "Hello."},
            "columns 'prompt' and 'completion': one is a list of messages",
        ),
        (
            {"prompt": "hi", "completion": "Hello.", "system": "x"},
            "column 'prompt' is a text, which takes no 'system'; accepted: messages, an instruction, or",
        ),
        (
            {"text": "hi", "tools": TOOLS},
            "column 'text' is a text, which takes no 'tools'; accepted: messages",
        ),
        ({"prompt": " ", "completion": "Hello."}, "column 'prompt' is empty"),
        (
            {"messagess": HI},
            "column 'instruction' is missing, and so is 'messages'; the row has messagess (column ",
        ),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            "column 'history', turn 1: expected a pair of texts, found ['a']",
        ),
        (
            {"instruction": "x", "output": "y", "history": [["a", " "]]},
            "column 'history', turn 1: a text is empty",
        ),
        ({"instruction": "\ud83d", "output": "y"}, "column 'instruction': '\\ud83d' has half of a character"),
        (
            {"messages": chat("hi", "\udc00")},
            "message 2 (assistant): content: '\\udc00' has half of a character",
        ),
    ],
)
def test_rejected_rows(row, error):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the beginning of the message is compared
        parse_conversation(row, {})
    assert not isinstance(caught.value, EmptyResponseError)
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (chat("hi", " \n"), "message 2 (assistant), the response, is empty"),
        ([HI[0], HI[1] | {"weight": 0}], "every assistant message has weight 0"),
        (
            [HI[1], HI[0], HI[1] | {"weight": 0}],
            "every assistant message after the first user message has weight 0",
        ),
    ],
)
def test_chats_without_response_are_distinguished(messages, error):
    with pytest.raises(EmptyResponseError) as caught:
        parse_messages(messages)
    assert str(caught.value) == error
