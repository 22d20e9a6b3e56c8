"""Chat templates: rendered messages, and what is found out about a template."""

import pytest
from transformers import AutoTokenizer

from gatera_lightning.datamodules.prompts.chat_template import (
    answer_suffix,
    end_of_turn,
    render_chat,
    supports_system_message,
)

WHERE = [{"role": "user", "content": "Where?"}]


def test_render_chat_opens_the_turn_of_the_assistant(chat_tokenizers):
    expected = "<bos><start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n"
    assert render_chat(chat_tokenizers["gemma"], WHERE) == (expected, "")


def test_render_chat_keeps_the_order_of_messages(chat_tokenizers):
    messages = [*WHERE, {"role": "assistant", "content": "Here."}, {"role": "user", "content": "Why?"}]
    expected = "<bos>[INST] Where? [/INST] Here. <eos><bos>[INST] Why? [/INST]"
    assert render_chat(chat_tokenizers["llama2"], messages) == (expected, " ")


def test_separator_is_found_if_messages_contain_the_placeholder(chat_tokenizers):
    said = [{"role": role, "content": "the answer"} for role in ("user", "assistant")]
    assert render_chat(chat_tokenizers["llama2"], [*said, *WHERE])[1] == " "
    assert render_chat(chat_tokenizers["gemma"], [*said, *WHERE])[1] == ""


def test_render_chat_reports_rejected_messages(with_chat_template):
    tokenizer = with_chat_template("{{ raise_exception('roles must alternate') }}")
    message = r"^the tokenizer's chat template rejects these messages: roles must alternate$"
    with pytest.raises(ValueError, match=message):
        render_chat(tokenizer, WHERE)


@pytest.mark.parametrize("kind", [None, "bos"])
def test_render_chat_needs_a_chat_template(kind, tokenizers_by_kind):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        render_chat(kind and tokenizers_by_kind[kind], WHERE)


def test_supports_system_message(chat_tokenizers, tokenizer_without_system_message):
    assert all(supports_system_message(tokenizer) for tokenizer in chat_tokenizers.values())
    assert not supports_system_message(tokenizer_without_system_message)


@pytest.mark.parametrize(
    ("kind", "token", "suffix"),
    [
        ("gemma", "<end_of_turn>", "<end_of_turn>"),
        ("llama3", "<eot>", "<eot>"),
        ("turn_ends_in_eos", "<eos>", ""),
        ("turns_without_names", "<eos>", ""),
        ("llama2", "<eos>", ""),
        ("turn_ends_in_text", "", ""),
    ],
)
def test_end_of_turn_and_answer_suffix(kind, token, suffix, chat_tokenizers):
    assert end_of_turn(chat_tokenizers[kind]) == token
    assert answer_suffix(chat_tokenizers[kind]) == suffix


def test_answer_suffix_of_extra_special_token(chat_tokenizers, tmp_path):
    """SmolLM2, Qwen and Gemma 2 list their end-of-turn token among the extra special tokens."""
    chat_tokenizers["gemma"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens=["<end_of_turn>"])
    assert "<end_of_turn>" in tokenizer.all_special_tokens
    assert answer_suffix(tokenizer) == "<end_of_turn>"
