"""Keys of examples: which examples ask the same question."""

import pytest

from gatera_lightning.datamodules.example import Example


def test_key_ignores_case_and_white_space():
    key = Example("Where is  milk?\n", ["Here", " there"], 0, "a").key
    assert len(key) == 16
    assert int(key, 16) >= 0
    assert Example(" where IS milk?", ["here ", "There"], 1, "b").key == key  # gold and task do not matter


@pytest.mark.parametrize(
    "other",
    [
        Example("Where is silk?", ["here", "there"], 0, "a"),
        Example("Where is milk ?", ["here", "there"], 0, "a"),
        Example("Whereis milk?", ["here", "there"], 0, "a"),
        Example("Where is milk?", ["here", "there", "nowhere"], 0, "a"),
        Example("Where is milk?", ["there", "here"], 0, "a"),
        Example("Where is milk?", ["here there"], 0, "a"),
        Example("Where is milk? here", ["there"], 0, "a"),
    ],
    ids=repr,
)
def test_key_differs_between_questions(other):
    assert other.key != Example("Where is milk?", ["here", "there"], 0, "a").key


def test_identity_replaces_prompt_and_answers():
    plain = Example("Question: Where?", [" here"], 0, "a", identity="Where? 1: here")
    assert (
        Example("### Where?", ["answer1", "answer2"], 1, "b", identity="WHERE?  1: here\n").key == plain.key
    )
    assert Example("Question: Where?", [" here"], 0, "a", identity="Where? 1: there").key != plain.key


def test_key_does_not_depend_on_template_or_answer_format(make_data, write, rows, chat_tokenizers):
    shouted = [row | {"instruction": row["instruction"].replace("Which of", " WHICH  of")} for row in rows(4)]
    sources = [write("rows.json", rows(4)), write("again.json", shouted)]
    found = [
        [
            example.key
            for example in make_data(
                tokenizer=chat_tokenizers["gemma"],
                template=template,
                answer_format=answer_format,
                test=sources,
            ).examples("test")
        ]
        for template in ("alpaca", "plain", "chat")
        for answer_format in ("label", "content")
    ]
    assert all(keys == found[0] for keys in found)
    assert found[0][:4] == found[0][4:]
    assert len(set(found[0])) == 4
