"""What a chat template writes, compared with the messages and the tools that it was given."""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.prompts.template_messages import Message, known_fact, template_messages
from gatera_lightning.datamodules.prompts.template_placeholders import (
    PLACEHOLDER_TOOLS,
    placeholder_messages,
    structure,
)
from gatera_lightning.datamodules.tokenization.chat_rendering import render_template
from gatera_lightning.datamodules.tokenization.control_tokens import THOUGHT_END, THOUGHT_START, unescape

log = logging.getLogger(__name__)

_CHECKED: WeakKeyDictionary[PreTrainedTokenizerBase, set[Any]] = WeakKeyDictionary()


def check_structure(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    *,
    generation_prompt: bool,
) -> None:
    """Raise ValueError unless the template writes each text once, in order, and all tools, calls and names.

    Texts of data may repeat each other, so the template gets placeholders in their places. Conversations of
    one structure are checked once.
    """
    checked = _CHECKED.setdefault(tokenizer, set())
    key = (structure(messages), bool(tools), generation_prompt, str(tokenizer.chat_template))
    if key in checked or not messages:
        return
    probes = placeholder_messages(messages)
    schemas = PLACEHOLDER_TOOLS if tools else ()
    rendered = render_template(
        tokenizer, template_messages(tokenizer, probes), schemas, generation_prompt=generation_prompt
    )
    _check_texts(rendered, probes)
    for number, probe in enumerate(probes, 1):
        for call in probe.get("tool_calls", ()):
            _check_written(rendered, call["function"], f"the tool_calls of message {number}", "tool_calls")
        if "name" in probe and probe["role"] != "tool":  # the call says whose result it is
            _check_written(rendered, probe["name"], f"the name of message {number}", "name")
    if tools:
        _check_written(rendered, [tool["function"] for tool in schemas], "tools", "tools")
    for number, probe in enumerate(probes[:-1], 1):
        if "reasoning_content" in probe and probe["reasoning_content"] not in rendered:
            log.warning(
                "the tokenizer's chat template leaves out the reasoning_content of earlier messages, such as "
                "message %d of %d; what the model reads is what it writes",
                number,
                len(probes),
            )
            break
    checked.add(key)


def _check_texts(rendered: str, probes: Sequence[Message]) -> None:
    last = -1
    for number, probe in enumerate(probes, 1):
        role, text = probe["role"], probe["content"]
        if not text:
            continue
        if (count := rendered.count(text)) != 1:
            times = "does not write" if count == 0 else f"writes {count} times"
            raise ValueError(
                f"the tokenizer's chat template {times} the text of message {number} ({role}) of "
                f"{len(probes)}; accepted: a template that writes every message once"
            )
        if role != "system" and rendered.index(text) < last:
            raise ValueError("the tokenizer's chat template writes messages in another order")
        last = last if role == "system" else rendered.index(text)


def _check_written(rendered: str, value: Any, what: str, key: str) -> None:
    for text in _placeholders(value):
        if text not in rendered:
            raise ValueError(
                f"the tokenizer's chat template does not write {what}; accepted: "
                f"{'rows' if key == 'tools' else 'messages'} without {key}, or another chat template"
            )


def _placeholders(value: Any) -> Iterator[str]:
    """The placeholders in a JSON value; they alone have a digit in them."""
    if isinstance(value, str):
        if any(character.isdigit() for character in value):
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _placeholders(key)
            yield from _placeholders(item)
    elif isinstance(value, list):
        for item in value:
            yield from _placeholders(item)


def opens_thought(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the generation prompt of the chat template opens a thought that responses continue."""
    return known_fact(tokenizer, "opens thought", _opens_thought)


def _opens_thought(tokenizer: PreTrainedTokenizerBase) -> bool:
    question = [{"role": "user", "content": "a question"}]
    try:
        text = render_template(tokenizer, template_messages(tokenizer, question), generation_prompt=True)
    except ValueError:  # rendering the conversation itself reports it
        return False
    opening = text.rpartition("a question")[2]
    return opening.count(THOUGHT_START) > opening.count(THOUGHT_END)


def check_contents(tokenizer: PreTrainedTokenizerBase, prompt: str, messages: Sequence[Message]) -> int:
    """Return where the last message ends in a prompt; raise ValueError if the text of one is not there."""
    plain, end = unescape(prompt), 0
    for number, message in enumerate(messages, 1):
        start = 0 if message["role"] == "system" else end
        texts = [text.strip() for text in _written_texts(tokenizer, message)]
        forms = [form for text in texts for form in (text, json.dumps(text, ensure_ascii=False)[1:-1])]
        place, form = next(
            ((place, form) for form in forms if (place := plain.find(form, start)) >= 0), (-1, "")
        )
        if place < 0:
            raise ValueError(
                f"the tokenizer's chat template changes the text of message {number} ({message['role']}), "
                f"{texts[0]!r:.60}; accepted: a template that writes texts as they are"
            )
        if message["role"] != "system":
            end = place + len(form)
    return _escaped_position(prompt, end)


def _written_texts(tokenizer: PreTrainedTokenizerBase, message: Message) -> Iterator[str]:
    """What a template may write for a message: its text, or without the thought of an earlier response."""
    text = message["content"]
    yield text
    if message["role"] == "assistant" and THOUGHT_END in text:
        is_closed = text.lstrip().startswith(THOUGHT_START)
        is_continued = text.count(THOUGHT_END) == 1 and THOUGHT_START not in text
        if is_closed or (is_continued and opens_thought(tokenizer)):
            yield text.partition(THOUGHT_END)[2]


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
