"""The tokenizer's chat template: rendering messages with it, and finding out how it marks turns.

Chat templates are arbitrary Jinja programs. Their conventions are found out by rendering short conversations,
not by looking for known tokens.
"""

from collections.abc import Sequence
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[Literal["role", "content"], str]
"""One message of a conversation, as chat templates expect it."""

_PLACEHOLDER_ANSWER = "the answer"
_PLACEHOLDER_SYSTEM = "the rules"


def render_chat(tokenizer: PreTrainedTokenizerBase | None, messages: Sequence[Message]) -> tuple[str, str]:
    """Render messages and the opening of the assistant's next turn.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The conversation so far.

    Returns:
        The prompt, with special tokens as text, and the white space that the template puts before an answer
        (often none).

    Raises:
        ValueError: The tokenizer has no chat template, or the template rejects the messages.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    conversation: list[dict[str, str]] = [
        {"role": message["role"], "content": message["content"]} for message in messages
    ]
    answer = {"role": "assistant", "content": _PLACEHOLDER_ANSWER}
    try:
        prompt = str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))
        answered = str(tokenizer.apply_chat_template([*conversation, answer], tokenize=False))
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template rejects these messages: {error}") from error
    separator = ""
    if answered.startswith(prompt):
        separator = answered.removeprefix(prompt).partition(_PLACEHOLDER_ANSWER)[0]
    return prompt, separator if separator.isspace() else ""


def supports_system_message(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template renders system messages; some reject them, and some ignore them."""
    messages = [
        {"role": "system", "content": _PLACEHOLDER_SYSTEM},
        {"role": "user", "content": "a question"},
    ]
    try:
        return _PLACEHOLDER_SYSTEM in tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        return False


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the special token with which the chat template ends an assistant turn, as text.

    Returns:
        The token without white space before it; empty if the turn does not end in a special token.
    """
    messages = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": _PLACEHOLDER_ANSWER},
    ]
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    ids = tokenizer(rendered.rpartition(_PLACEHOLDER_ANSWER)[2].lstrip(), add_special_tokens=False).input_ids
    added_special_ids = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    if not ids or ids[0] not in {*tokenizer.all_special_ids, *added_special_ids}:
        return ""
    return str(tokenizer.convert_ids_to_tokens(ids[0]))


def answer_suffix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text to append to an answer before EOS, so that an instruct model learns to end its turn.

    Returns:
        The chat template's end-of-turn token; empty if that is EOS, which every answer gets anyway, or if
        there is none.
    """
    token = end_of_turn(tokenizer)
    return "" if token == tokenizer.eos_token else token
