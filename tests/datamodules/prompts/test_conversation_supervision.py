"""Which tokens of a conversation are supervised, in every kind of chat template and tokenizer."""

from itertools import pairwise

import pytest
from chats import chat

from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.errors import ConfigError

HI = chat("hi", "Hello.", "bye", "Bye!", system="Be kind.")


def mark_supervised(tokenizer, batch, row=0):
    """A row of a batch as text, with its supervised tokens between ⟦ and ⟧."""
    length = int(batch["attention_mask"][row].sum())
    ids = batch["input_ids"][row, :length].tolist()
    supervised = (batch["labels"][row, :length] != IGNORE_INDEX).tolist()
    bounds = [0, *(i for i in range(1, length) if supervised[i] != supervised[i - 1]), length]
    spans = [(supervised[start], tokenizer.decode(ids[start:end])) for start, end in pairwise(bounds)]
    return "".join(f"⟦{text}⟧" if marked else text for marked, text in spans)


def without_marks(text, keep=0):
    """Remove all marks but the last ``keep``."""
    count = text.count("⟦") - keep
    return text.replace("⟦", "", count).replace("⟧", "", count)


@pytest.fixture
def marked(make_instruction_data, write):
    """``marked(messages, **settings)`` is the marked text of a chat, the same in training and validation."""

    def build(messages, **settings):
        path = write("chat.json", [{"messages": messages}])
        sources = {split: [path] for split in ("train", "validation", "test")}
        data = make_instruction_data(stage="fit", **sources | {"train_on": "every_response"} | settings)
        (batch,), (training_batch,) = data.val_dataloader(), data.train_dataloader()
        assert training_batch["labels"].equal(batch["labels"])
        supervised = int((batch["labels"] != IGNORE_INDEX).sum())
        assert training_batch["step_supervised_tokens"] == batch["step_supervised_tokens"] == supervised
        return mark_supervised(data.tokenizer, batch)

    return build


# The user says the same as the assistant, and some texts end in a character of several tokens.
TALK = chat("Hello 👋", "Hello 👋", "Grüße?", "yes\nthe cat 👋", "never", "no", system="Be kind.")

MARKED_TALK = {  # by kind of chat template
    "turn_ends_in_eos": "<im_start>system\nBe kind.<eos>\n"
    "<im_start>user\nHello 👋<eos>\n<im_start>assistant\n⟦Hello 👋<eos>⟧\n"
    "<im_start>user\nGrüße?<eos>\n<im_start>assistant\n⟦yes\nthe cat 👋<eos>⟧\n"
    "<im_start>user\nnever<eos>\n<im_start>assistant\n⟦no<eos>⟧",
    "gemma": "<bos><start_of_turn>system\nBe kind.<end_of_turn>\n"
    "<start_of_turn>user\nHello 👋<end_of_turn>\n<start_of_turn>model\n⟦Hello 👋<end_of_turn>⟧\n"
    "<start_of_turn>user\nGrüße?<end_of_turn>\n<start_of_turn>model\n⟦yes\nthe cat 👋<end_of_turn>⟧\n"
    "<start_of_turn>user\nnever<end_of_turn>\n<start_of_turn>model\n⟦no<end_of_turn><eos>⟧",
    "llama3": "<bos><start_header>system<end_header>\n\nBe kind.<eot>"
    "<start_header>user<end_header>\n\nHello 👋<eot>"
    "<start_header>assistant<end_header>\n\n⟦Hello 👋<eot>⟧"
    "<start_header>user<end_header>\n\nGrüße?<eot>"
    "<start_header>assistant<end_header>\n\n⟦yes\nthe cat 👋<eot>⟧"
    "<start_header>user<end_header>\n\nnever<eot>"
    "<start_header>assistant<end_header>\n\n⟦no<eot><eos>⟧",
    # This template ends a turn in a space and EOS.
    "llama2": " Be kind. <eos><bos>[INST] Hello 👋 [/INST]⟦ Hello 👋 <eos>⟧"
    "<bos>[INST] Grüße? [/INST]⟦ yes\nthe cat 👋 <eos>⟧<bos>[INST] never [/INST]⟦ no<eos>⟧",
    "turns_without_names": "Be kind.<eos>Hello 👋<eos>⟦Hello 👋<eos>⟧Grüße?<eos>⟦yes\nthe cat 👋<eos>⟧"
    "never<eos>⟦no<eos>⟧",
}


@pytest.mark.parametrize("kind", MARKED_TALK)
def test_supervised_tokens_in_chat_template(kind, chat_tokenizers, marked, make_instruction_data, write):
    settings = {"template": "chat", "tokenizer": chat_tokenizers[kind]}
    assert marked(TALK, **settings) == MARKED_TALK[kind]
    last_response_only = without_marks(MARKED_TALK[kind], keep=1)
    assert marked(TALK, **settings, train_on="response") == last_response_only

    path = write("chat.json", [{"messages": TALK}])
    data = make_instruction_data(validation=[path], **settings, train_on="all", stage="validate")
    (batch,) = data.val_dataloader()
    assert data.tokenizer.decode(batch["input_ids"][0]) == without_marks(MARKED_TALK[kind])
    assert batch["labels"][0, 0] == IGNORE_INDEX
    assert batch["labels"][0, 1:].equal(batch["input_ids"][0, 1:])


# A chat in the few words that all tokenizers know.
KNOWN_WORDS = chat("cat?", "yes", "never cat?", "no never", "Question:", "never", system="Answer:")


@pytest.mark.parametrize(
    "kind",
    [
        *("plain", "bos", "closing", "closing_without_bos", "bos_is_eos", "bos_is_eos_closing"),
        *("pieces", "spanning", "words", "words_bos"),
    ],
)
def test_supervised_tokens_in_plain_template(kind, tokenizers_by_kind, marked):
    """The space before a response is supervised where it is a part of the response's first token."""
    tokenizer = tokenizers_by_kind[kind]
    text = marked(KNOWN_WORDS, tokenizer=tokenizer)
    spans = [span.partition("⟧")[0] for span in text.split("⟦")[1:]]
    space = "" if kind in ("pieces", "spanning", "words", "words_bos") else " "
    eos = " <eos>" if kind in ("words", "words_bos") else "<eos>"
    last_space = " " if kind == "spanning" else space  # the last response is tokenized apart from the prompt
    assert spans == [f"{space}yes{eos}", f"{space}no never{eos}", f"{last_space}never{eos}"]

    last_response_only = marked(KNOWN_WORDS, tokenizer=tokenizer, train_on="response")
    assert last_response_only.count("⟦") == 1
    assert last_response_only.partition("⟦")[2] == text.rpartition("⟦")[2]


def test_supervised_tokens_of_smollm2(smollm2, marked):
    expected = MARKED_TALK["turn_ends_in_eos"]
    expected = expected.replace("<im_start>", "<|im_start|>").replace("<eos>", "<|im_end|>")
    assert marked(TALK, template="chat", tokenizer=smollm2) == expected
    plain = (
        "Be kind.\nUser: Hello 👋\nAssistant:⟦ Hello 👋<|im_end|>⟧\n"
        "User: Grüße?\nAssistant:⟦ yes\nthe cat 👋<|im_end|>⟧\nUser: never\nAssistant:⟦ no<|im_end|>⟧"
    )
    assert marked(TALK, tokenizer=smollm2) == plain


def test_two_responses_in_a_row_are_both_supervised(chat_tokenizers, marked):
    messages = [*chat("hi", "Hello."), {"role": "assistant", "content": "And you?"}]
    text = marked(messages, template="chat", tokenizer=chat_tokenizers["llama3"])
    assert text.partition("hi<eot>")[2] == (
        "<start_header>assistant<end_header>\n\n⟦Hello.<eot>⟧"
        "<start_header>assistant<end_header>\n\n⟦And you?<eot><eos>⟧"
    )


def test_other_token_after_earlier_response_is_not_supervised(with_chat_template, marked):
    tokenizer = with_chat_template(
        "{% for m in messages %}{{ m.content }}"
        "{{ '<unk>' if m.role == 'assistant' and not loop.last else '<eos>' }}{% endfor %}"
    )
    text = marked(HI[1:], template="chat", tokenizer=tokenizer)
    assert text == "hi<eos>⟦Hello.⟧<unk>bye<eos>⟦Bye!<eos>⟧"


def test_file_may_mix_instructions_and_chats(chat_tokenizers, make_instruction_data, write):
    rows = [{"messages": HI}, {"instruction": "Add.", "input": "1 2", "output": "3"}, {"messages": HI[:3]}]
    data = make_instruction_data(
        validation=[write("mixed.json", rows)],
        template="chat",
        train_on="every_response",
        tokenizer=chat_tokenizers["turns_without_names"],
        eval_batch_size=3,
        stage="validate",
    )
    (batch,) = data.val_dataloader()
    rows = enumerate(batch["example_ids"].tolist())
    assert {example: mark_supervised(data.tokenizer, batch, row) for row, example in rows} == {
        0: "Be kind.<eos>hi<eos>⟦Hello.<eos>⟧bye<eos>⟦Bye!<eos>⟧",
        1: "Add.\n\n1 2<eos>⟦3<eos>⟧",
        2: "Be kind.<eos>hi<eos>⟦Hello.<eos>⟧",
    }


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("weights", [(0, 1, 1), (1, 0, None), (0, 0, 1), (None, None, 1)])
def test_responses_of_weight_0_are_not_supervised(template, weights, chat_tokenizers, marked):
    tokenizer = chat_tokenizers["llama3"]
    messages = chat("Q1", "one", "Q2", "two", "Q3", "three")
    weighted = [
        message | ({} if message["role"] == "user" else {"weight": weights[i // 2]})
        for i, message in enumerate(messages)
    ]
    text = marked(weighted, template=template, tokenizer=tokenizer)
    expected = marked(messages, template=template, tokenizer=tokenizer)
    assert without_marks(text) == without_marks(expected)
    supervised = [span.partition("⟧")[0] for span in text.split("⟦")[1:]]
    words = [word for word, weight in zip(("one", "two", "three"), weights, strict=True) if weight != 0]
    assert [span.strip().partition("<")[0] for span in supervised] == words


@pytest.mark.parametrize("train_on", ["response", "every_response"])
def test_chat_ends_at_its_last_response_with_weight(train_on, marked):
    messages = [*HI[1:], HI[1], HI[2] | {"weight": 0}]
    assert marked(messages, train_on=train_on) == marked(HI[1:], train_on=train_on)


def test_train_on_all_rejects_weight_0(make_instruction_data, write):
    messages = [HI[1], HI[2] | {"weight": 0}, *HI[3:]]
    data = make_instruction_data(train=[write("rows.json", [{"messages": messages}])], train_on="all")
    message = r"rows\.json, row 1: a message has weight 0, but train_on all trains on every message; accepted"
    with pytest.raises(ConfigError, match=message):
        list(data.examples("train"))


@pytest.mark.parametrize(("template", "kind"), [("plain", "llama3"), ("chat", "turn_ends_in_eos")])
def test_assistant_may_speak_first(template, kind, chat_tokenizers, marked):
    """Its greeting is supervised like every response, and stays if the chat is short enough."""
    messages = [{"role": "assistant", "content": "Welcome!"}, *HI[1:3]]
    text = marked(messages, template=template, tokenizer=chat_tokenizers[kind])
    spans = [span.partition("⟧")[0].strip() for span in text.split("⟦")[1:]]
    assert spans == ["Welcome!<eos>", "Hello.<eos>"]
    with_rules = marked([HI[0], *messages], template=template, tokenizer=chat_tokenizers[kind])
    assert [span.partition("⟧")[0].strip() for span in with_rules.split("⟦")[1:]] == spans


@pytest.mark.parametrize("response", ["    return x\n", "\n\n- a\n- b", "x  ", "\tx"])
@pytest.mark.parametrize(("template", "kind"), [("plain", "gemma"), ("chat", "gemma"), ("chat", "llama2")])
def test_white_space_of_responses_is_supervised(template, kind, response, chat_tokenizers, marked):
    """Also where a template trims earlier messages, as those of Gemma and Llama 3 do."""
    tokenizer = chat_tokenizers[kind]
    text = marked(chat("hi", response), template=template, tokenizer=tokenizer)
    end = "<end_of_turn><eos>" if (template, kind) == ("chat", "gemma") else "<eos>"
    space = "" if (template, kind) == ("chat", "gemma") else " "
    assert text.partition("⟦")[2] == f"{space}{response}{end}⟧"


def test_white_space_of_requests_stays(marked):
    text = marked(chat("Continue:\n\tdef f(x):\n", "    return x"), train_on="response")
    assert text == "<bos>User: Continue:\n\tdef f(x):\n\nAssistant:⟦     return x<eos>⟧"


def test_text_is_supervised_as_a_whole(make_instruction_data, write):
    """It is written as it is; prompt and completion are a text whose beginning is not supervised."""
    rows = [{"text": " Once upon\n"}, {"prompt": "Once", "completion": " upon a time"}]
    for template in ("plain", "alpaca"):
        data = make_instruction_data(
            validation=[write("rows.json", rows)], template=template, eval_batch_size=2, stage="validate"
        )
        (batch,) = data.val_dataloader()
        order = {example: row for row, example in enumerate(batch["example_ids"].tolist())}
        assert [mark_supervised(data.tokenizer, batch, order[example]) for example in (0, 1)] == [
            "<bos>⟦ Once upon\n<eos>⟧",
            "<bos>Once⟦ upon a time<eos>⟧",
        ]


def test_text_without_prompt_is_not_evaluated_by_generation(make_instruction_data, write):
    data = make_instruction_data(
        test=[write("rows.json", [{"text": "Once"}])], evaluate_by=["likelihood", "generation"]
    )
    message = r"rows\.json, row 1: a text without a prompt, .*; accepted data\.evaluate_by: likelihood$"
    with pytest.raises(ConfigError, match=message):
        list(data.examples("test"))


# --- templates and tokenizers that do not allow every_response ---

OPENS_WITH_REASONING = (  # the generation prompt is longer than the heading of an earlier turn
    "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<im_start>assistant\n<think>\n{% endif %}"
)
INCONSISTENT_TEMPLATES = {
    # As in templates of reasoning models, earlier turns lose what precedes </think>:
    "drops_reasoning": "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<eos>{% endfor %}",
    "opens_with_reasoning": OPENS_WITH_REASONING,
    # Only earlier turns have a heading:
    "names_earlier_turns": "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
    "Assistant said: {% endif %}{{ m.content }}<eos>\n{% endfor %}",
    # Earlier turns have another heading:
    "renames_earlier_turns": "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
    "ASSISTANT: {% endif %}{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}


@pytest.mark.parametrize("template", INCONSISTENT_TEMPLATES)
def test_every_response_rejects_inconsistent_template(
    template, with_chat_template, make_instruction_data, write
):
    settings = {
        "train": [write("chat.json", [{"messages": chat("hi", "<think>Hm.</think>Hello.", "bye", "Bye!")}])],
        "template": "chat",
        "tokenizer": with_chat_template(INCONSISTENT_TEMPLATES[template], "turn_ends_in_eos"),
    }
    message = (
        r"chat\.json, row 1: train_on every_response: the tokenizer's chat template renders earlier "
        r"responses differently from the last one, .*; accepted: response, all$"
    )
    with pytest.raises(ConfigError, match=message):
        list(make_instruction_data(**settings, train_on="every_response").examples("train"))
    for train_on in ("response", "all"):
        (example,) = make_instruction_data(**settings, train_on=train_on).examples("train")
        thought = "\n</think>\n\n" if template == "opens_with_reasoning" else ""
        assert example.answers[0] in (f"{thought}Bye!", " Bye!")


def test_every_response_accepts_single_turn_in_any_template(with_chat_template, make_instruction_data, write):
    (example,) = make_instruction_data(
        train=[write("chat.json", [{"messages": chat("hi", "Hello.")}])],
        template="chat",
        tokenizer=with_chat_template(OPENS_WITH_REASONING),
        train_on="every_response",
    ).examples("train")
    assert example.earlier_responses == ()


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_every_response_needs_a_fast_tokenizer(
    template, chat_tokenizers, make_instruction_data, write, marked, monkeypatch
):
    tokenizer = chat_tokenizers["gemma"]
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    settings = {"template": template, "tokenizer": tokenizer}
    test = [write("chat.json", [{"messages": HI}])]
    message = r"(?s)data\.test, example 0 \(.*: train_on every_response needs a fast "
    with pytest.raises(ConfigError, match=message):
        make_instruction_data(test=test, stage="test", **settings, train_on="every_response")
    assert marked(HI, **settings, train_on="response").count("⟦") == 1
