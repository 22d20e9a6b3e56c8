"""Prompt templates: the exact text a model reads."""

import copy
from typing import get_args

import pytest

from gatera_lightning.datamodules.prompts.templates import (
    Template,
    chat_prompt,
    render,
    shows_system,
    turn_close,
    turn_end,
)
from gatera_lightning.errors import ConfigError

ALPACA = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Where is milk kept?

### Response:
"""


def test_alpaca_is_the_published_text():
    assert render("alpaca", "Where is milk kept?", ["fridge"]) == (ALPACA, ["fridge"])


ALPACA_WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Translate into French.

### Input:
good morning

### Response:
"""


def test_alpaca_with_an_input_is_the_published_text():
    assert render("alpaca", "Translate into French.", ["bonjour"], context="good morning") == (
        ALPACA_WITH_INPUT,
        ["bonjour"],
    )


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_elsewhere_a_context_follows_the_request_after_an_empty_line(template, chat_tokenizers):
    tokenizer = chat_tokenizers["gemma"]
    found = render(template, "Translate.", ["bonjour"], tokenizer, context="good morning")
    assert found == render(template, "Translate.\n\ngood morning", ["bonjour"], tokenizer)
    assert "Translate.\n\ngood morning" in found[0]


@pytest.mark.parametrize("template", get_args(Template))
def test_no_context_leaves_no_trace(template, chat_tokenizers):
    tokenizer = chat_tokenizers["gemma"]
    assert render(template, "Where?", ["here"], tokenizer, context="") == render(
        template, "Where?", ["here"], tokenizer
    )


def test_plain_leaves_the_space_to_the_answer():
    assert render("plain", "Where is milk kept?", ["fridge"]) == (
        "Question: Where is milk kept?\nAnswer:",
        [" fridge"],
    )


@pytest.mark.parametrize("template", get_args(Template))
def test_no_prompt_ends_in_a_space(template, chat_tokenizers):
    prompt, (answer,) = render(template, "Where?", ["here"], chat_tokenizers["gemma"])
    assert not prompt.endswith(" ")
    assert answer.strip() == "here"


@pytest.mark.parametrize("template", get_args(Template))
def test_braces_in_a_request_are_text(template, chat_tokenizers):
    request = "what is {request} in {0}, {{ bos_token }} or {}?"
    for context in ("", "{context} {request}"):
        prompt = render(template, request, ["a {b}"], chat_tokenizers["gemma"], context=context)[0]
        assert request in prompt
        assert context in prompt


def test_unknown_template_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'vicuna'.*alpaca, plain, chat"):
        render("vicuna", "Where?", ["here"])


# --- the tokenizer's own template ---

WHERE = [{"role": "user", "content": "Where?"}]
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}SYSTEM{% else %}[{{ m.content }}]{% endif %}{% endfor %}"


def _with_template(tokenizer, template):
    """A copy of a tokenizer with another chat template."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


def test_chat_is_one_user_turn_and_the_opening_of_the_answer(chat_tokenizers):
    expected = "<bos><start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n"
    assert chat_prompt(chat_tokenizers["gemma"], WHERE) == (expected, "")
    assert render("chat", "Where?", ["here"], chat_tokenizers["gemma"]) == (expected, ["here"])


def test_turns_are_written_in_order(chat_tokenizers):
    turns = [*WHERE, {"role": "assistant", "content": "Here."}, {"role": "user", "content": "Why?"}]
    expected = "<bos>[INST] Where? [/INST] Here. <eos><bos>[INST] Why? [/INST]"
    assert chat_prompt(chat_tokenizers["llama2"], turns) == (expected, " ")


def test_an_answer_that_was_said_before_hides_no_space(chat_tokenizers):
    """The space is looked for behind the prompt, in which the stand-in for an answer may occur."""
    turns = [
        {"role": "user", "content": "the answer"},
        {"role": "assistant", "content": "the answer"},
        *WHERE,
    ]
    assert chat_prompt(chat_tokenizers["llama2"], turns)[1] == " "
    assert chat_prompt(chat_tokenizers["gemma"], turns)[1] == ""


def test_turns_that_a_template_refuses(chat_tokenizers):
    refusing = _with_template(chat_tokenizers["gemma"], "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ValueError, match=r"^the tokenizer's chat template refuses these turns: roles must alternate$"
    ):
        chat_prompt(refusing, WHERE)


def test_whether_a_template_shows_a_system_message(chat_tokenizers):
    shown = {kind: shows_system(tokenizer) for kind, tokenizer in chat_tokenizers.items()}
    assert shown == dict.fromkeys(chat_tokenizers, True)
    drops, refuses = (
        _with_template(chat_tokenizers["gemma"], NO_SYSTEM.replace("SYSTEM", text))
        for text in ("", "{{ raise_exception('no system') }}")
    )
    assert not shows_system(drops)
    assert not shows_system(refuses)


def test_the_space_that_a_chat_template_puts_before_an_answer(chat_tokenizers):
    tokenizer = chat_tokenizers["llama2"]
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "here"}]
    prompt, (answer,) = render("chat", "Where?", ["here"], tokenizer)
    assert answer == " here"
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith(prompt + answer)


@pytest.mark.parametrize(
    ("kind", "end", "close"),
    [
        ("gemma", "<end_of_turn>", "<end_of_turn>"),
        ("llama3", "<eot>", "<eot>"),
        ("turn_ends_in_eos", "", "<eos>"),
        ("turns_without_names", "", "<eos>"),
        ("llama2", "", "<eos>"),
        ("turn_ends_in_text", "", ""),
    ],
)
def test_the_token_that_ends_a_turn(kind, end, close, chat_tokenizers):
    """Before EOS, where that does not close the turn itself."""
    assert (turn_end(chat_tokenizers[kind]), turn_close(chat_tokenizers[kind])) == (end, close)


def test_a_turn_end_with_a_name_among_the_special_tokens(chat_tokenizers, tmp_path):
    """As SmolLM2, Qwen and Gemma 2 list theirs."""
    from transformers import AutoTokenizer

    chat_tokenizers["gemma"].save_pretrained(tmp_path)
    named = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens=["<end_of_turn>"])
    assert "<end_of_turn>" in named.all_special_tokens
    assert turn_end(named) == "<end_of_turn>"


@pytest.mark.parametrize("kind", [None, "bos"])
def test_chat_without_a_template(kind, tokenizers_by_kind):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        chat_prompt(kind and tokenizers_by_kind[kind], WHERE)


def test_a_tokenizer_without_template_is_refused_when_it_is_connected(
    make_data, tokenizers_by_kind, chat_tokenizers
):
    with pytest.raises(
        ConfigError, match=r"data\.template: chat needs a tokenizer with a chat template.*use alpaca, plain$"
    ):
        make_data(template="chat", tokenizer=tokenizers_by_kind["bos"])
    make_data(template="plain", tokenizer=tokenizers_by_kind["bos"])
    data = make_data(template="chat", tokenizer=chat_tokenizers["llama3"])
    assert all(example.chat for example in data.examples("test"))
    assert not any(example.chat for example in make_data(template="plain").examples("test"))
