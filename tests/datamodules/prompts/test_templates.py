"""Prompt templates: the exact text that a model reads."""

from typing import get_args

import pytest

from gatera_lightning.datamodules.prompts import Template, render
from gatera_lightning.errors import ConfigError

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nWhere is milk kept?\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nTranslate into French.\n\n### Input:\ngood morning\n\n### Response:\n"
)


def test_alpaca_is_the_published_text():
    assert render("alpaca", "Where is milk kept?", ["fridge"]) == (ALPACA, ["fridge"])
    found = render("alpaca", "Translate into French.", ["bonjour"], context="good morning")
    assert found == (ALPACA_WITH_INPUT, ["bonjour"])


def test_plain_answer_starts_with_space():
    found = render("plain", "Where is milk kept?", ["fridge"])
    assert found == ("Question: Where is milk kept?\nAnswer:", [" fridge"])


def test_chat_is_one_user_message(chat_tokenizers):
    expected = "<bos><start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n"
    assert render("chat", "Where?", ["here"], chat_tokenizers["gemma"]) == (expected, ["here"])


def test_chat_answer_starts_with_space_of_template(chat_tokenizers):
    tokenizer = chat_tokenizers["llama2"]
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "here"}]
    prompt, (answer,) = render("chat", "Where?", ["here"], tokenizer)
    assert answer == " here"
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith(prompt + answer)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_context_follows_request(template, chat_tokenizers):
    tokenizer = chat_tokenizers["gemma"]
    found = render(template, "Translate.", ["bonjour"], tokenizer, context="good morning")
    assert found == render(template, "Translate.\n\ngood morning", ["bonjour"], tokenizer)
    assert "Translate.\n\ngood morning" in found[0]


@pytest.mark.parametrize("template", get_args(Template))
def test_prompt_never_ends_in_space(template, chat_tokenizers):
    prompt, (answer,) = render(template, "Where?", ["here"], chat_tokenizers["gemma"])
    assert not prompt.endswith(" ")
    assert answer.strip() == "here"


@pytest.mark.parametrize("template", get_args(Template))
def test_braces_are_not_interpreted(template, chat_tokenizers):
    request = "what is {request} in {0}, {{ bos_token }} or {}?"
    for context in ("", "{context} {request}"):
        prompt = render(template, request, ["a {b}"], chat_tokenizers["gemma"], context=context)[0]
        assert request in prompt
        assert context in prompt


def test_render_rejects_unknown_template():
    with pytest.raises(ValueError, match=r"unknown template 'vicuna'; accepted: alpaca, plain, chat"):
        render("vicuna", "Where?", ["here"])


def test_connect_rejects_chat_without_chat_template(make_data, tokenizers_by_kind, chat_tokenizers):
    message = r"data\.template: chat needs a tokenizer with a chat template.*use alpaca, plain$"
    with pytest.raises(ConfigError, match=message):
        make_data(template="chat", tokenizer=tokenizers_by_kind["bos"])
    data = make_data(template="chat", tokenizer=chat_tokenizers["llama3"])
    assert all(example.chat for example in data.examples("test"))
    data = make_data(template="plain", tokenizer=tokenizers_by_kind["bos"])
    assert not any(example.chat for example in data.examples("test"))
