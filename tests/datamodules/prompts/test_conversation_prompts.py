"""Prompts of conversations: their text, and how they are truncated."""

import pytest
from chats import chat

from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.prompts import render
from gatera_lightning.datamodules.prompts.conversation_prompts import ConversationPrompts
from gatera_lightning.datamodules.prompts.conversations import Chat, Instruction, PlainText
from gatera_lightning.errors import ConfigError

HI = chat("hi", "Hello.", "bye", "Bye!", system="Be kind.")


def render_prompt(conversation, template, tokenizer=None, *, max_length=9999, locate=False):
    if isinstance(conversation, list):
        conversation = Chat(tuple(conversation))
    return ConversationPrompts(template, tokenizer, locate).render(conversation, max_length)


# --- text ---


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
@pytest.mark.parametrize("context", ["", "1 2"])
def test_instruction_is_rendered_by_template(template, context, chat_tokenizers):
    tokenizer = chat_tokenizers["llama2"]
    prompt = render_prompt(Instruction("Add.", context, "3"), template, tokenizer)
    text, (answer,) = render(template, "Add.", ["3"], tokenizer, context=context)
    assert (prompt.text, prompt.answer, prompt.earlier_responses, prompt.truncated) == (
        text,
        answer,
        (),
        False,
    )
    assert ("1 2" in text) == bool(context)


def test_plain_chat_names_the_speakers(tokenizer):
    prompt = render_prompt(HI, "plain", tokenizer)
    assert prompt.text == "Be kind.\nUser: hi\nAssistant: Hello.<eos>\nUser: bye\nAssistant:"
    assert prompt.answer == " Bye!"


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_alpaca_renders_chat_of_one_turn_as_instruction(system, tokenizer):
    prompt = render_prompt(chat("hi", "Hello.", system=system), "alpaca", tokenizer)
    request = f"{system}\n\nhi" if system else "hi"
    assert (prompt.text, [prompt.answer]) == render("alpaca", request, ["Hello."])


@pytest.mark.parametrize(
    "messages", [HI, HI[1:], [*chat("hi", "Hello."), {"role": "assistant", "content": "And?"}]]
)
def test_alpaca_rejects_chat_of_several_turns(messages, tokenizer):
    message = (
        f"^template alpaca has a single turn, but the chat has {len(messages)} messages; "
        "accepted templates: chat, plain$"
    )
    with pytest.raises(ValueError, match=message):
        render_prompt(messages, "alpaca", tokenizer)


def test_render_rejects_unknown_template(tokenizer):
    with pytest.raises(ValueError, match=r"unknown template None; accepted: alpaca, plain, chat"):
        render_prompt(Instruction("Add.", "", "3"), None, tokenizer)


def test_system_message_moves_into_first_user_message(tokenizer_without_system_message):
    tokenizer = tokenizer_without_system_message
    prompt = render_prompt(HI, "chat", tokenizer, locate=True)
    earlier = [prompt.text[start:end] for start, end in prompt.earlier_responses]
    assert earlier == ["Hello.<eos>"]
    assert prompt.text == "Be kind.\n\nhi<eos>Hello.<eos>bye<eos>"
    assert render_prompt(HI[1:], "chat", tokenizer).text == "hi<eos>Hello.<eos>bye<eos>"
    truncated = render_prompt(HI, "chat", tokenizer, max_length=20)
    assert truncated.text == "Be kind.\n\nbye<eos>"


def test_rejected_messages_are_reported_with_their_row(with_chat_template, make_instruction_data, write):
    tokenizer = with_chat_template(
        "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('two turns at most') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}"
    )
    path = write("rows.json", [{"messages": HI[1:3]}, {"messages": HI[1:]}])
    data = make_instruction_data(template="chat", tokenizer=tokenizer, train=[path])
    message = r"rows\.json, row 2: the tokenizer's chat template rejects these messages: two turns at most$"
    with pytest.raises(ConfigError, match=message):
        list(data.examples("train"))


# --- truncation ---

LONG = chat(*(f"{who} {'so ' * n}{n}" for n in range(5) for who in ("question", "reply")), system="Be kind.")
TEMPLATES = [
    *((kind, "plain") for kind in ("plain", "closing", "pieces", "spanning")),
    *((kind, "chat") for kind in ("turn_ends_in_eos", "gemma", "llama3", "llama2", "turns_without_names")),
]


@pytest.mark.parametrize(("kind", "template"), TEMPLATES)
def test_oldest_turns_are_dropped_until_the_chat_fits(
    kind, template, tokenizers_by_kind, chat_tokenizers, make_instruction_data, write
):
    """A truncated chat equals the same chat without its oldest turns; the system message stays."""
    tokenizer = (tokenizers_by_kind | chat_tokenizers)[kind]
    settings = {"template": template, "tokenizer": tokenizer, "train_on": "every_response", "stage": "test"}

    def table(rows, max_length):
        return list(
            make_instruction_data(test=[write("rows.json", rows)], max_length=max_length, **settings).tables[
                "test"
            ]
        )

    shorter = [{"messages": [LONG[0], *LONG[1 + 2 * dropped :]]} for dropped in range(5)]
    expected = table(shorter, 9999)
    assert not any(row["truncated"] for row in expected)
    needed = [row["lengths"][0] for row in expected]
    assert needed == sorted(needed, reverse=True)
    for max_length in {*needed, *(length - 1 for length in needed[:-1]), needed[0] + 1}:
        (row,) = table(shorter[:1], max_length)
        dropped = next(dropped for dropped in range(5) if needed[dropped] <= max_length)
        for column in ("prompt", "earlier_responses", "answers"):
            assert row[column] == expected[dropped][column]
        assert row["truncated"] == (dropped > 0)


@pytest.mark.parametrize(("kind", "template"), TEMPLATES)
def test_long_last_turn_is_truncated_by_tokens(
    kind, template, tokenizers_by_kind, chat_tokenizers, make_instruction_data, write
):
    """The turn has two responses, of which the first is cut; the remaining tokens keep their labels."""
    tokenizer = (tokenizers_by_kind | chat_tokenizers)[kind]
    messages = [
        *chat("when? why?", "never, no", system="Be kind."),
        {"role": "assistant", "content": "or yes"},
    ]
    settings = {
        "validation": [write("row.json", [{"messages": messages}])],
        "template": template,
        "tokenizer": tokenizer,
        "train_on": "every_response",
        "stage": "validate",
    }

    def tokens(max_length):
        (batch,) = make_instruction_data(max_length=max_length, **settings).val_dataloader()
        return batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), int(batch["response_mask"].sum())

    ids, labels, answer = tokens(9999)
    bos = int(ids[0] == tokenizer.bos_token_id)
    assert sum(label != IGNORE_INDEX for label in labels) > answer
    for max_length in {answer + bos + 1, *range(answer + bos + 2, len(ids), 4), len(ids) - 1}:
        start = len(ids) - max_length + bos
        truncated_ids, truncated_labels, _ = tokens(max_length)
        assert truncated_ids == ids[:bos] + ids[start:]
        assert truncated_labels[0] == IGNORE_INDEX
        assert truncated_labels[1:] == (labels[:bos] + labels[start:])[1:]


def test_response_that_leaves_no_room_for_the_prompt(make_instruction_data, write):
    rows = [{"messages": chat("hi", "Hello.")}, {"messages": chat("hi", "Hello.", "bye", "long " * 30)}]
    with pytest.raises(ConfigError, match=r"an answer has \d+ tokens, which leaves no room for a prompt"):
        make_instruction_data(train=[write("rows.json", rows)], validation=1, max_length=20, stage="fit")


def test_earlier_responses_are_located_once_however_many_turns_are_dropped(chat_tokenizers, monkeypatch):
    calls = []
    locate = ConversationPrompts._locate_earlier_responses
    monkeypatch.setattr(
        ConversationPrompts,
        "_locate_earlier_responses",
        lambda self, *args: calls.append(args) or locate(self, *args),
    )
    prompts = ConversationPrompts("chat", chat_tokenizers["gemma"], locate_earlier_responses=True)
    turns = [{"role": role, "content": f"word {n}"} for n in range(20) for role in ("user", "assistant")]
    prompt = prompts.render(Chat(tuple(turns)), max_length=120)
    assert prompt.truncated
    assert 0 < len(prompt.earlier_responses) < 19
    assert len(calls) == 1


def test_raw_text_with_the_noncharacter_of_escapes_is_refused(chat_tokenizers):
    prompts = ConversationPrompts("chat", chat_tokenizers["gemma"])
    with pytest.raises(ValueError, match=r"noncharacter U\+FDD0"):
        prompts.render(PlainText("", "a\ufdd0b"), 100)
