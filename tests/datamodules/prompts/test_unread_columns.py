"""A column with a meaning in another shape is refused, or named, and never ignored without a word."""

import pytest

from gatera_lightning.datamodules import CommonsenseDataModule, MathDataModule
from gatera_lightning.datamodules.prompts.conversations import parse_conversation

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]}
OPEN = {"messages": [*CHAT["messages"], {"role": "user", "content": "And?"}]}
INSTRUCTION = {"instruction": "hi", "output": "Hello."}
COMPLETION = {"prompt": "hi", "completion": "Hello."}
TEXT = {"text": "hi"}
PAIRS = "columns 'chosen' and 'rejected': pairs of responses"


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (INSTRUCTION | {"weight": 0}, "column 'weight': 0; accepted: 1, or 'weight' 0 or 1 in assistant"),
        (CHAT | {"weight": 0.5}, "column 'weight': 0.5; accepted: 1"),
        (TEXT | {"sample_weight": "0"}, "column 'sample_weight': '0'; accepted: 1"),
        (COMPLETION | {"loss_weight": False}, "column 'loss_weight': False; accepted: 1"),
        (COMPLETION | {"rejected": "Go away."}, PAIRS),
        (INSTRUCTION | {"chosen": "Hello.", "rejected": "Go away."}, PAIRS),
        (OPEN | {"chosen": {"role": "assistant", "content": "Hm."}}, PAIRS),
        (COMPLETION | {"label": False}, "column 'label': False; labels of desirable responses"),
        (COMPLETION | {"label": "True"}, "column 'label': 'True'; labels of desirable responses"),
        (INSTRUCTION | {"kto_tag": True}, "column 'kto_tag': True; labels of desirable responses"),
        (COMPLETION | {"input": "x"}, "column 'input': 'x', but the row is a prompt and a completion, which"),
        (CHAT | {"input": "x"}, "column 'input': 'x', but the row is a chat"),
        (TEXT | {"history": [["a", "b"]]}, "column 'history': [['a', 'b']], but the row is a text"),
        (COMPLETION | {"instruction": "x"}, "column 'instruction': 'x', but the row is a prompt and"),
        (OPEN | {"output": "So."}, "column 'output': 'So.', but the row is a chat"),
        (OPEN | {"completion": "So."}, "column 'completion': 'So.', but the row is a chat"),
        (INSTRUCTION | {"reasoning_content": "Hm."}, "column 'reasoning_content': keys of a message"),
        (COMPLETION | {"tool_calls": [{}]}, "column 'tool_calls': keys of a message"),
        (COMPLETION | {"completion_mask": [0, 1]}, "column 'completion_mask': masks of tokens"),
    ],
)
def test_column_that_would_change_what_is_learned_is_refused(row, error):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the beginning of the message is compared
        parse_conversation(row, {})
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize("row", [CHAT, INSTRUCTION, COMPLETION, TEXT], ids=["chat", "pair", "prompt", "text"])
def test_columns_that_say_nothing_are_accepted(row):
    empty = {"weight": 1, "loss_weight": "1.0", "sample_weight": None, "example_weight": float("nan")}
    empty |= {
        "rejected": "",
        "image": float("nan"),
        "documents": " ",
        "history": [],
        "input": " ",
        "kto_tag": None,
        "label": 3 if "prompt" in row else True,
    }
    assert parse_conversation(row | empty, {}) == parse_conversation(row, {})
    columns = {"system": "loss_weight"} if "text" not in row and "prompt" not in row else {}
    named = parse_conversation(row | {"loss_weight": "0"}, columns) if columns else None
    assert named is None or named.messages[0]["content"] == "0"


def test_column_of_another_shape_is_named_once(make_instruction_data, write, caplog):
    """Preference data of the field has the chosen messages in its rows, too; Alpaca has whole texts."""
    rows = [CHAT | {"prompt": "hi", "rejected": [], "chosen": CHAT["messages"], "id": "1"}] * 2
    rows += [INSTRUCTION | {"text": "hi Hello.", "reasoning": "Greet."}] * 2
    data = make_instruction_data(train=[write("rows.json", rows)])
    assert len(list(data.examples("train"))) == 4
    assert [record.message for record in caplog.records] == [
        "column 'prompt' is not read in a chat",
        "column 'chosen' is not read in a chat",
        "column 'text' is not read in an instruction",
        "column 'reasoning' is not read in an instruction",
    ]


@pytest.mark.parametrize("make", [CommonsenseDataModule, MathDataModule])
@pytest.mark.parametrize("column", ["weight", "system", "history", "tools"])
def test_rows_of_tasks_with_their_own_prompt(make, column):
    asked = "Is it true?\n\nAnswer format: true/false"
    row = {"instruction": asked, "answer": "true"} if make is CommonsenseDataModule else {}
    row = row or {"question": "What is 1 + 1?", "answer": "#### 2"}
    style = {"answer_format": "content"} if make is CommonsenseDataModule else {"answer_style": "gsm8k"}
    data = make(template="plain", train_on="response", **style)
    expected = data.example(row, "mine")
    assert data.example(row | {column: None, "id": 3}, "mine") == expected
    with pytest.raises(ValueError, match=f"column '{column}': "):
        data.example(row | {column: 0.5 if column == "weight" else "Be brief."}, "mine")
