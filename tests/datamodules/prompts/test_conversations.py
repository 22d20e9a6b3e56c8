"""Instructions and chats: how a row is read, what a prompt of it says, and which of its tokens carry loss."""

import copy
from itertools import pairwise

import pytest

from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.prompts.conversations import (
    Chat,
    ConversationPrompts,
    Instruction,
    parse_conversation,
)
from gatera_lightning.datamodules.prompts.templates import render
from gatera_lightning.errors import ConfigError


def _chat(*said, system=None):
    """Messages of user and assistant by turns, the user first."""
    turns = [
        {"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(said)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


HI = _chat("hi", "Hello.", "bye", "Bye!", system="Be kind.")


# --- rows ---


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, {}, Instruction("Add.", "1 2", "3")),
        (
            {"instruction": " Add.\n", "input": "\t1 2 ", "output": "\n3 "},
            {},
            Instruction("Add.", "1 2", "3"),
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
        ({"turns": _chat(" hi\n", "\tHello. ")}, {"messages": "turns"}, Chat(tuple(_chat("hi", "Hello.")))),
        ({"messages": [message | {"name": "x"} for message in HI]}, {}, Chat(tuple(HI))),
    ],
)
def test_a_row_as_a_conversation(row, columns, expected):
    assert parse_conversation(row, columns) == expected


def test_the_response_of_a_chat_is_its_last_message():
    assert Chat(tuple(HI)).response == "Bye!"


MAPPED = {"instruction": "question", "output": "answer", "messages": "turns"}


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (["a"], {}, "expected an object with columns, found list"),
        (None, {}, "expected an object with columns, found NoneType"),
        (
            {"question": "Why?", "answer": "So."},
            {},
            "column 'instruction' is missing, and so is 'messages'; the row has question, answer. "
            "data.columns: {instruction: NAME} reads another one",
        ),
        (
            {"instruction": "Why?", "answer": "So."},
            {},
            "column 'output' is missing; the row has instruction, answer. data.columns: {output: NAME} reads another one",
        ),
        (
            {"instruction": "Why?", "output": "So."},
            MAPPED,
            "column 'question' is missing, and so is 'turns'; the row has instruction, output. "
            "data.columns: {instruction: NAME} reads another one",
        ),
        (
            {},
            {},
            "column 'instruction' is missing, and so is 'messages'; the row has no columns. "
            "data.columns: {instruction: NAME} reads another one",
        ),
        ({"instruction": "Why?", "output": ""}, {}, "column 'output' is empty"),
        ({"instruction": "Why?", "output": " \n"}, {}, "column 'output' is empty"),
        ({"instruction": "Why?", "output": None}, {}, "column 'output' is empty"),
        ({"instruction": None, "output": "So.", "messages": None}, {}, "column 'instruction' is empty"),
        (
            {"question": "Why?", "answer": "So.", "turns": []},
            MAPPED,
            "columns 'turns' and 'question': expected one of the two in a row",
        ),
        ({"instruction": "\t", "output": "So."}, {}, "column 'instruction' is empty"),
        ({"question": "Why?", "answer": ""}, MAPPED, "column 'answer' is empty"),
        ({"instruction": 5, "output": "So."}, {}, "column 'instruction': expected a text, found 5"),
        ({"instruction": "Why?", "output": ["So."]}, {}, "column 'output': expected a text, found ['So.']"),
        ({"instruction": "Why?", "output": b"So."}, {}, "column 'output': expected a text, found b'So.'"),
        (
            {"instruction": "Why?", "output": "So.", "input": 0},
            {},
            "column 'input': expected a text, found 0",
        ),
        (
            {"question": "Why?", "answer": "So.", "about": {}},
            MAPPED | {"input": "about"},
            "column 'about': expected a text, found {}",
        ),
    ],
)
def test_a_row_that_is_no_conversation_is_said_to_lack_what_it_lacks(row, columns, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        parse_conversation(row, columns)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages: expected a list of objects with role and content, found 'hi'"),
        (
            {"role": ["user"]},
            "messages: expected a list of objects with role and content, found {'role': ['user']}",
        ),
        ([], "messages: expected a list of objects with role and content, found []"),
        (["hi", "Hello."], "message 1: expected an object with role and content, found 'hi'"),
        (
            [{"from": "human", "value": "hi"}],
            "message 1: expected an object with role and content, found from, value",
        ),
        ([*HI, {"role": "user"}], "message 6: expected an object with role and content, found role"),
        (
            [{"role": "human", "content": "hi"}],
            "message 1: role 'human' is unknown; accepted: system, user, assistant",
        ),
        (
            [*HI, {"role": None, "content": "hi"}],
            "message 6: role None is unknown; accepted: system, user, assistant",
        ),
        ([*HI, {"role": "user", "content": ""}], "message 6 (user): expected a text as content, found ''"),
        (_chat("hi", " \n"), "message 2 (assistant): expected a text as content, found ' \\n'"),
        (_chat("hi", None), "message 2 (assistant): expected a text as content, found None"),
        (_chat(["hi"], "Hello."), "message 1 (user): expected a text as content, found ['hi']"),
        ([*HI, HI[0], *HI[1:]], "message 6: a system message stands first or nowhere"),
        ([HI[0], *HI], "message 2: a system message stands first or nowhere"),
        (HI[:4], "the last message is the user's; expected the assistant's, which is the response"),
        (HI[:1], "the last message is the system's; expected the assistant's, which is the response"),
        (HI[2:], "the first turn is the assistant's; expected the user's"),
        ([HI[0], *HI[2:]], "the first turn is the assistant's; expected the user's"),
    ],
)
def test_messages_that_are_no_chat(messages, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_conversation({"messages": messages}, {})
    assert str(caught.value) == message


def test_what_was_found_is_shown_in_part(make_own, write):
    """A whole book in a message is no help."""
    for row in (
        {"messages": "x" * 999},
        {"instruction": ["x" * 999], "output": "y"},
        {"messages": [{"x" * 999: 1}]},
    ):
        with pytest.raises(ConfigError, match=r"rows\.json, row 1: ") as caught:
            list(make_own(train=[write("rows.json", [row])]).examples("train"))
        assert "x" * 50 in str(caught.value)
        assert str(caught.value).count("x") < 70


# --- prompts ---


def _fitting(conversation, template, tokenizer=None, *, max_length=9999, earlier=False):
    return ConversationPrompts(template, tokenizer, earlier).fitting(conversation, max_length)


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
@pytest.mark.parametrize("context", ["", "1 2"])
def test_an_instruction_is_rendered_as_everywhere(template, context, chat_tokenizers):
    tokenizer = chat_tokenizers["llama2"]
    found = _fitting(Instruction("Add.", context, "3"), template, tokenizer)
    text, (answer,) = render(template, "Add.", ["3"], tokenizer, context=context)
    assert (found.text, found.answer, found.earlier, found.shortened) == (text, answer, (), False)
    assert ("1 2" in text) == bool(context)


def test_a_plain_chat_says_who_speaks(tokenizer):
    prompt = _fitting(Chat(tuple(HI)), "plain", tokenizer)
    assert prompt.text == "Be kind.\nUser: hi\nAssistant: Hello.<eos>\nUser: bye\nAssistant:"
    assert prompt.answer == " Bye!"


def test_a_chat_of_one_turn_is_an_instruction_in_alpaca(tokenizer):
    for system in ("", "Be kind."):
        prompt = _fitting(Chat(tuple(_chat("hi", "Hello.", system=system))), "alpaca", tokenizer)
        request = f"{system}\n\nhi" if system else "hi"
        assert (prompt.text, [prompt.answer]) == render("alpaca", request, ["Hello."])


@pytest.mark.parametrize(
    "said", [HI, HI[1:], [*_chat("hi", "Hello."), {"role": "assistant", "content": "And?"}]]
)
def test_alpaca_has_one_turn(said, tokenizer):
    message = f"^a chat of {len(said)} messages; template alpaca has one turn: use chat or plain$"
    with pytest.raises(ValueError, match=message):
        _fitting(Chat(tuple(said)), "alpaca", tokenizer)


def test_an_unknown_template(tokenizer):
    with pytest.raises(ValueError, match=r"unknown template None; accepted: alpaca, plain, chat"):
        _fitting(Instruction("Add.", "", "3"), None, tokenizer)


def _with_template(tokenizer, template):
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}SYSTEM{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"


@pytest.mark.parametrize("refusal", ["", "{{ raise_exception('no system') }}"])
def test_a_system_message_that_the_template_has_no_place_for_is_said_by_the_user(refusal, chat_tokenizers):
    tokenizer = _with_template(chat_tokenizers["gemma"], NO_SYSTEM.replace("SYSTEM", refusal))
    prompt = _fitting(Chat(tuple(HI)), "chat", tokenizer, earlier=True)
    assert prompt.text == "Be kind.\n\nhi<eos>Hello.<eos>bye<eos>"
    assert [prompt.text[start:end] for start, end in prompt.earlier] == ["Hello.<eos>"]
    assert _fitting(Chat(tuple(HI[1:])), "chat", tokenizer).text == "hi<eos>Hello.<eos>bye<eos>"
    assert (
        _fitting(Chat(tuple(HI)), "chat", tokenizer, max_length=20).text == "Be kind.\n\nbye<eos>"
    )  # turns gone


def test_turns_that_the_template_refuses_are_named(chat_tokenizers, make_own, write):
    strict = (
        "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('two turns at most') }}{% endif %}"
    )
    tokenizer = _with_template(chat_tokenizers["gemma"], strict + "[{{ m.content }}]{% endfor %}")
    path = write("rows.json", [{"messages": HI[1:3]}, {"messages": HI[1:]}])
    data = make_own(template="chat", tokenizer=tokenizer, train=[path])
    message = r"rows\.json, row 2: the tokenizer's chat template refuses these turns: two turns at most$"
    with pytest.raises(ConfigError, match=message):
        list(data.examples("train"))


# --- what carries loss, marked: ⟦ … ⟧ ---


def _marked(tokenizer, batch, row=0):
    """A row of a batch as text, what carries loss in brackets."""
    length = int(batch["attention_mask"][row].sum())
    ids, kept = batch["input_ids"][row, :length].tolist(), (batch["labels"][row, :length] != IGNORE_INDEX).tolist()
    text = ""
    starts = [0, *(place for place in range(1, length) if kept[place] != kept[place - 1]), length]
    for start, end in pairwise(starts):
        piece = tokenizer.decode(ids[start:end])
        text += f"⟦{piece}⟧" if kept[start] else piece
    return text


@pytest.fixture
def marked(make_own, write):
    """``marked(messages, template=…)``: the marked text of a chat in its validation batch, which is that of training."""

    def build(messages, **settings):
        path = write("chat.json", [{"messages": messages}])
        settings = {
            "train": [path],
            "validation": [path],
            "test": [path],
            "train_on": "every_response",
        } | settings
        data = make_own(stage="fit", **settings)
        (batch,), (trained,) = data.val_dataloader(), data.train_dataloader()
        assert trained["labels"].equal(batch["labels"])
        assert (
            trained["step_supervised_tokens"]
            == batch["step_supervised_tokens"]
            == int((batch["labels"] != IGNORE_INDEX).sum())
        )
        return _marked(data.tokenizer, batch)

    return build


# The user says what the assistant says, and is not trained on; the assistant ends in a character of several tokens.
TALK = _chat("Hello 👋", "Hello 👋", "Grüße?", "yes\nthe cat 👋", "never", "no", system="Be kind.")

CHATS = {  # by hand: TALK in each template
    "turn_ends_in_eos": "<im_start>system\nBe kind.<eos>\n"
    "<im_start>user\nHello 👋<eos>\n<im_start>assistant\n⟦Hello 👋<eos>⟧\n"
    "<im_start>user\nGrüße?<eos>\n<im_start>assistant\n⟦yes\nthe cat 👋<eos>⟧\n"
    "<im_start>user\nnever<eos>\n<im_start>assistant\n⟦no<eos>⟧",
    "gemma": "<bos><start_of_turn>system\nBe kind.<end_of_turn>\n"
    "<start_of_turn>user\nHello 👋<end_of_turn>\n<start_of_turn>model\n⟦Hello 👋<end_of_turn>⟧\n"
    "<start_of_turn>user\nGrüße?<end_of_turn>\n<start_of_turn>model\n⟦yes\nthe cat 👋<end_of_turn>⟧\n"
    "<start_of_turn>user\nnever<end_of_turn>\n<start_of_turn>model\n⟦no<end_of_turn><eos>⟧",
    "llama3": "<bos><start_header>system<end_header>\n\nBe kind.<eot>"
    "<start_header>user<end_header>\n\nHello 👋<eot><start_header>assistant<end_header>\n\n⟦Hello 👋<eot>⟧"
    "<start_header>user<end_header>\n\nGrüße?<eot><start_header>assistant<end_header>\n\n⟦yes\nthe cat 👋<eot>⟧"
    "<start_header>user<end_header>\n\nnever<eot><start_header>assistant<end_header>\n\n⟦no<eot><eos>⟧",
    # No token closes a turn here: behind a response stand a space and EOS.
    "llama2": " Be kind. <eos><bos>[INST] Hello 👋 [/INST]⟦ Hello 👋 <eos>⟧<bos>[INST] Grüße? [/INST]⟦ yes\nthe cat 👋 <eos>⟧"
    "<bos>[INST] never [/INST]⟦ no<eos>⟧",
    "turns_without_names": "Be kind.<eos>Hello 👋<eos>⟦Hello 👋<eos>⟧Grüße?<eos>⟦yes\nthe cat 👋<eos>⟧never<eos>⟦no<eos>⟧",
}


def _unmarked(text, but=0):
    """A marked text without its first brackets; ``but`` is how many remain."""
    count = text.count("⟦") - but
    return text.replace("⟦", "", count).replace("⟧", "", count)


@pytest.mark.parametrize("kind", CHATS)
def test_every_response_of_a_chat_carries_loss(kind, chat_tokenizers, marked):
    assert marked(TALK, template="chat", tokenizer=chat_tokenizers[kind]) == CHATS[kind]


@pytest.mark.parametrize("kind", CHATS)
def test_the_last_response_alone_carries_loss(kind, chat_tokenizers, marked):
    found = marked(TALK, template="chat", tokenizer=chat_tokenizers[kind], train_on="response")
    assert found == _unmarked(CHATS[kind], but=1)


@pytest.mark.parametrize("kind", CHATS)
def test_all_but_the_first_token_carries_loss(kind, chat_tokenizers, make_own, write):
    path, tokenizer = write("chat.json", [{"messages": TALK}]), chat_tokenizers[kind]
    data = make_own(validation=[path], template="chat", tokenizer=tokenizer, train_on="all", stage="validate")
    (batch,) = data.val_dataloader()
    assert tokenizer.decode(batch["input_ids"][0]) == _unmarked(CHATS[kind])
    assert batch["labels"][0, 0] == IGNORE_INDEX
    assert batch["labels"][0, 1:].equal(batch["input_ids"][0, 1:])


KINDS = [
    *("plain", "bos", "closing", "closing_without_bos", "bos_is_eos", "bos_is_eos_closing"),
    *("pieces", "spanning", "words", "words_bos"),
]
KNOWN = _chat(
    "cat?", "yes", "never cat?", "no never", "Question:", "never", system="Answer:"
)  # words that all kinds know


@pytest.mark.parametrize("kind", KINDS)
def test_every_response_of_a_plain_chat_carries_loss(kind, tokenizers_by_kind, marked):
    """With the space before it, where that is the response's token."""
    found = marked(KNOWN, tokenizer=tokenizers_by_kind[kind])
    stretches = [part.partition("⟧")[0] for part in found.split("⟦")[1:]]
    space = "" if kind in ("pieces", "spanning", "words", "words_bos") else " "
    eos = " <eos>" if kind in ("words", "words_bos") else "<eos>"
    last = (
        f" never{eos}" if kind == "spanning" else f"{space}never{eos}"
    )  # the answer is tokenised behind the prompt
    assert stretches == [f"{space}yes{eos}", f"{space}no never{eos}", last]


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_response_of_a_plain_chat_alone_carries_loss(kind, tokenizers_by_kind, marked):
    every, one = (
        marked(KNOWN, tokenizer=tokenizers_by_kind[kind], train_on=which)
        for which in ("every_response", "response")
    )
    assert one.count("⟦") == 1
    assert one.partition("⟦")[2] == every.rpartition("⟦")[2]


def test_a_plain_chat_asks_a_slow_tokenizer_for_no_places(tokenizer, marked, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert marked(HI, train_on="response").endswith("User: bye\nAssistant:⟦ Bye!<eos>⟧")


def test_smollm2_every_response(smollm2, marked):
    expected = CHATS["turn_ends_in_eos"].replace("<im_start>", "<|im_start|>").replace("<eos>", "<|im_end|>")
    assert marked(TALK, template="chat", tokenizer=smollm2) == expected
    plain = (
        "Be kind.\nUser: Hello 👋\nAssistant:⟦ Hello 👋<|im_end|>⟧\nUser: Grüße?\nAssistant:⟦ yes\nthe cat 👋<|im_end|>⟧\n"
        "User: never\nAssistant:⟦ no<|im_end|>⟧"
    )
    assert marked(TALK, tokenizer=smollm2) == plain


def test_two_responses_in_a_row_are_both_trained_on(chat_tokenizers, marked):
    messages = [*_chat("hi", "Hello."), {"role": "assistant", "content": "And you?"}]
    found = marked(messages, template="chat", tokenizer=chat_tokenizers["llama3"])
    assert found.partition("hi<eot>")[2] == (
        "<start_header>assistant<end_header>\n\n⟦Hello.<eot>⟧<start_header>assistant<end_header>\n\n⟦And you?<eot><eos>⟧"
    )


def test_what_closes_only_the_last_turn_is_not_looked_for_in_earlier_ones(chat_tokenizers, marked):
    template = "{% for m in messages %}{{ m.content }}{{ '<unk>' if m.role == 'assistant' and not loop.last else '<eos>' }}"
    tokenizer = _with_template(chat_tokenizers["gemma"], template + "{% endfor %}")
    found = marked(HI[1:], template="chat", tokenizer=tokenizer)
    assert found == "hi<eos>⟦Hello.⟧<unk>bye<eos>⟦Bye!<eos>⟧"


def test_rows_of_both_kinds_stand_in_one_file(chat_tokenizers, make_own, write):
    rows = [{"messages": HI}, {"instruction": "Add.", "input": "1 2", "output": "3"}, {"messages": HI[:3]}]
    path = write("mixed.json", rows)
    settings = {
        "template": "chat",
        "train_on": "every_response",
        "tokenizer": chat_tokenizers["turns_without_names"],
    }
    data = make_own(validation=[path], stage="validate", eval_batch_size=3, **settings)
    (batch,) = data.val_dataloader()
    texts = {
        int(example): _marked(data.tokenizer, batch, row) for row, example in enumerate(batch["example_ids"])
    }
    assert texts == {
        0: "Be kind.<eos>hi<eos>⟦Hello.<eos>⟧bye<eos>⟦Bye!<eos>⟧",
        1: "Add.\n\n1 2<eos>⟦3<eos>⟧",
        2: "Be kind.<eos>hi<eos>⟦Hello.<eos>⟧",
    }


REFUSED = r"chat\.json, row 1: train_on every_response: the tokenizer's chat template writes an earlier response otherwise than "
REFUSED += r"the last one, so it cannot be trained on where it stands; accepted: response, all$"
DROPS_REASONING = (  # as templates of reasoning models do: earlier turns lose what stands before </think>
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<eos>{% endfor %}"
)
OPENS_WITH_REASONING = (  # the opening of a turn to come is more than that of one that was
    "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<im_start>assistant\n<think>\n{% endif %}"
)
NAMES_EARLIER_TURNS = (  # and the other way round
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}Assistant said: {% endif %}"
    "{{ m.content }}<eos>\n{% endfor %}"
)


SHOUTS_EARLIER_NAMES = NAMES_EARLIER_TURNS.replace("Assistant said: ", "ASSISTANT: ").replace(
    "<eos>\n{% endfor %}", "<eos>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    "template", [DROPS_REASONING, OPENS_WITH_REASONING, NAMES_EARLIER_TURNS, SHOUTS_EARLIER_NAMES, None]
)
def test_a_template_that_rewrites_earlier_turns(template, chat_tokenizers, make_own, write):
    """None: the kind that names the assistant in turns that were, and not in one to come."""
    kind = "turn_ends_in_eos" if template else "turn_ends_in_text"
    tokenizer = _with_template(chat_tokenizers[kind], template or chat_tokenizers[kind].chat_template)
    source = [write("chat.json", [{"messages": _chat("hi", "<think>Hm.</think>Hello.", "bye", "Bye!")}])]
    with pytest.raises(ConfigError, match=REFUSED):
        list(
            make_own(train=source, template="chat", tokenizer=tokenizer, train_on="every_response").examples(
                "train"
            )
        )
    for train_on in ("response", "all"):
        (example,) = make_own(train=source, template="chat", tokenizer=tokenizer, train_on=train_on).examples(
            "train"
        )
        assert example.answers[0].strip() == "Bye!"


def test_a_chat_without_earlier_turns_needs_no_places(chat_tokenizers, make_own, write):
    tokenizer = _with_template(chat_tokenizers["gemma"], OPENS_WITH_REASONING)
    source = [write("chat.json", [{"messages": _chat("hi", "Hello.")}])]
    (example,) = make_own(
        train=source, template="chat", tokenizer=tokenizer, train_on="every_response"
    ).examples("train")
    assert example.earlier_responses == ()


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_every_response_with_a_slow_tokenizer(template, chat_tokenizers, make_own, write, monkeypatch):
    tokenizer = chat_tokenizers["gemma"]
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    settings = {"template": template, "tokenizer": tokenizer, "train_on": "every_response"}
    message = r"train_on every_response needs a fast tokenizer, which knows the characters of each token$"
    with pytest.raises(ConfigError, match=r"(?s)^data\.test, example 0 \(.*: " + message):
        make_own(test=[write("chat.json", [{"messages": HI}])], stage="test", **settings)


# --- too long ---


LONG = _chat(*(f"{who} {'so ' * n}{n}" for n in range(5) for who in ("question", "reply")), system="Be kind.")
TEMPLATES = [
    *((kind, "plain") for kind in ("plain", "closing", "pieces", "spanning")),
    *((kind, "chat") for kind in CHATS),
]


@pytest.mark.parametrize(("kind", "template"), TEMPLATES)
def test_whole_turns_go_the_oldest_first_and_the_system_message_stays(
    kind, template, tokenizers_by_kind, chat_tokenizers, make_own, write
):
    """As many as must: a row of the table is that of the chat without them, and never longer than max_length."""
    tokenizer = (tokenizers_by_kind | chat_tokenizers)[kind]
    shorter = [{"messages": [LONG[0], *LONG[1 + 2 * gone :]]} for gone in range(5)]
    settings = {"template": template, "tokenizer": tokenizer, "train_on": "every_response", "stage": "test"}
    whole = list(make_own(test=[write("shorter.json", shorter)], max_length=9999, **settings).tables["test"])
    assert not any(row["truncated"] for row in whole)
    needed = [row["lengths"][0] for row in whole]
    assert needed == sorted(needed, reverse=True)
    for room in {*needed, *(length - 1 for length in needed[:-1]), needed[0] + 1}:
        (row,) = make_own(test=[write("long.json", shorter[:1])], max_length=room, **settings).tables["test"]
        gone = next(gone for gone in range(5) if needed[gone] <= room)
        for column in ("prompt", "earlier", "answers"):
            assert row[column] == whole[gone][column]
        assert row["truncated"] == (gone > 0)


@pytest.mark.parametrize(("kind", "template"), TEMPLATES)
def test_a_last_turn_too_long_is_cut_and_what_is_left_keeps_its_labels(
    kind, template, tokenizers_by_kind, chat_tokenizers, make_own, write
):
    """Two responses follow it, so that the first is cut into: labels are the whole row's behind the cut, BOS in front."""
    tokenizer = (tokenizers_by_kind | chat_tokenizers)[kind]
    messages = [
        *_chat("when? why?", "never, no", system="Be kind."),
        {"role": "assistant", "content": "or yes"},
    ]
    source = [write("row.json", [{"messages": messages}])]
    settings = {
        "template": template,
        "tokenizer": tokenizer,
        "train_on": "every_response",
        "stage": "validate",
    }

    def row(room):
        (batch,) = make_own(validation=source, max_length=room, **settings).val_dataloader()
        return batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), int(batch["response_mask"].sum())

    ids, labels, answer = row(9999)
    bos = int(ids[0] == tokenizer.bos_token_id)
    assert sum(label != IGNORE_INDEX for label in labels) > answer
    for room in {answer + bos + 1, *range(answer + bos + 2, len(ids), 4), len(ids) - 1}:
        cut, kept, _ = row(room)
        assert cut == ids[:bos] + ids[len(ids) - room + bos :]
        assert kept[0] == IGNORE_INDEX
        assert kept[1:] == (labels[:bos] + labels[len(ids) - room + bos :])[1:]


def test_a_response_that_leaves_no_room_is_named(make_own, write):
    path = write(
        "rows.json",
        [{"messages": _chat("hi", "Hello.")}, {"messages": HI[1:-1] + _chat("", "long " * 30)[1:]}],
    )
    message = r"an answer has \d+ tokens, which leaves no room for a prompt in max_length 20"
    with pytest.raises(ConfigError, match=message):
        make_own(train=[path], validation=1, max_length=20, stage="fit")


# --- what a question is the same by ---


def test_a_chat_is_the_same_whatever_the_template_and_its_length(chat_tokenizers, make_own, write):
    path = write(
        "rows.json", [{"messages": HI}, {"messages": HI[:3]}, {"instruction": "hi", "output": "hello."}]
    )
    tokenizer = chat_tokenizers["gemma"]
    settings = [{"template": "plain"}, {"template": "chat"}, {"template": "plain", "max_length": 40}]
    keys = [
        [e.key for e in make_own(train=[path], tokenizer=tokenizer, **one).examples("train")]
        for one in settings
    ]
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys[0])) == 3
    (alone,) = make_own(train=[write("chat.json", [{"messages": _chat("Hi", "Hello.")}])]).examples("train")
    assert alone.key == keys[0][2]  # a chat of one turn is its instruction


@pytest.mark.parametrize(
    "other", [{"input": "3 4"}, {"input": ""}, {"output": "7"}, {"instruction": "Multiply."}]
)
def test_another_instruction_input_or_output_is_another_question(other, make_own, write):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    keys = [
        example.key for example in make_own(train=[write("rows.json", [row, row | other])]).examples("train")
    ]
    assert keys[0] != keys[1]
