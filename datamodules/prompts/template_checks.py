"""What a chat template writes, compared with the messages and the tools that it was given."""

import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.prompts.template_messages import Message, template_messages
from gatera_lightning.datamodules.tokenization.chat_rendering import render_template
from gatera_lightning.datamodules.tokenization.control_tokens import THOUGHT_END, unescape

_CHECKED: WeakKeyDictionary[PreTrainedTokenizerBase, set[tuple[str, ...]]] = WeakKeyDictionary()


def check_roles(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> None:
    """Raise ValueError unless the template writes the text of every message once, in order.

    Contents of data may repeat each other, so this takes other texts in their places. Tool messages answer a
    call, so conversations with them are only searched for their own texts.
    """
    checked = _CHECKED.setdefault(tokenizer, set())
    key = (*roles, str(tokenizer.chat_template))
    if key in checked or not roles or "tool" in roles:
        return
    texts = [f"text number {number} here" for number in range(len(roles))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    rendered = render_template(tokenizer, template_messages(tokenizer, messages), generation_prompt=True)
    last = -1
    for number, (role, text) in enumerate(zip(roles, texts, strict=True), 1):
        if (count := rendered.count(text)) != 1:
            times = "does not write" if count == 0 else f"writes {count} times"
            raise ValueError(
                f"the tokenizer's chat template {times} the text of message {number} ({role}) of "
                f"{len(roles)}; accepted: a template that writes every message once"
            )
        if role != "system" and rendered.index(text) < last:
            raise ValueError("the tokenizer's chat template writes messages in another order")
        last = last if role == "system" else rendered.index(text)
    checked.add(key)


def check_contents(prompt: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> int:
    """Return where the last message ends in a prompt; raise ValueError if the text of one is not there."""
    plain, end = unescape(prompt), 0
    for number, message in enumerate(messages, 1):
        text = message["content"]
        if message["role"] == "assistant":
            text = text.rpartition(THOUGHT_END)[2]  # templates drop earlier thoughts
        start = 0 if message["role"] == "system" else end
        forms = dict.fromkeys([text.strip(), json.dumps(text.strip(), ensure_ascii=False)[1:-1]])
        place, form = next(
            ((place, form) for form in forms if (place := plain.find(form, start)) >= 0), (-1, "")
        )
        if place < 0:
            raise ValueError(
                f"the tokenizer's chat template changes the text of message {number} ({message['role']}), "
                f"{text.strip()!r:.60}; accepted: a template that writes texts as they are"
            )
        if message["role"] != "system":
            end = place + len(form)
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in plain:
                raise ValueError(
                    f"the tokenizer's chat template does not write the tool_calls of message {number}; "
                    "accepted: messages without tool_calls, or another chat template"
                )
    for tool in tools:
        if tool.get("function", tool).get("name", "") not in plain:
            raise ValueError(
                "the tokenizer's chat template does not write tools; accepted: rows without tools, or "
                "another chat template"
            )
    return _escaped_position(prompt, end)


def _escaped_position(escaped: str, position: int) -> int:
    """The position in an escaped text of a position in the same text without escapes."""
    if unescape(escaped) == escaped:
        return position
    plain = 0
    for index, character in enumerate(escaped):
        if plain == position:
            return index
        plain += unescape(character) != ""
    return len(escaped)
