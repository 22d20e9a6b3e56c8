"""Messages in the form that a chat template expects, with the control tokens in their texts escaped."""

import json
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.tokenization.chat_rendering import render_template
from gatera_lightning.datamodules.tokenization.control_tokens import control_tokens

Message = dict[str, Any]
"""One message: role, content, and optionally reasoning_content, tool_calls, tool_call_id, name and weight."""

_PROBE = "the answer"
_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Any, bool]] = WeakKeyDictionary()


def template_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """Return messages as the chat template expects them, with the control tokens in their texts escaped."""
    escape = control_tokens(tokenizer).escape
    wants_parts = known_fact(tokenizer, "parts", _wants_parts)
    converted = []
    for message in messages:
        others = {key: value for key, value in message.items() if key not in ("role", "content", "weight")}
        content: Any = escape(message["content"], response=message["role"] == "assistant")
        if wants_parts:
            content = [{"type": "text", "text": content}]
        if "tool_calls" in others and known_fact(tokenizer, "arguments", _wants_text_arguments):
            others["tool_calls"] = [_with_text_arguments(call) for call in others["tool_calls"]]
        converted.append({"role": message["role"], "content": content} | escape_texts(tokenizer, others))
    return converted


def escape_texts(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """Escape the control tokens in all texts of a JSON value."""
    if isinstance(value, str):
        return control_tokens(tokenizer).escape(value)
    if isinstance(value, dict):
        return {escape_texts(tokenizer, key): escape_texts(tokenizer, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape_texts(tokenizer, item) for item in value]
    return value


def known_fact(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: Callable[[PreTrainedTokenizerBase], bool]
) -> bool:
    """Return what a template expects or does, found out once for each tokenizer and template.

    Args:
        tokenizer: A tokenizer with a chat template.
        question: Name of the question.
        answer: Finds the answer out, by rendering messages.
    """
    known = _KNOWN.setdefault(tokenizer, {})
    key = (question, str(tokenizer.chat_template))
    if key not in known:
        known[key] = answer(tokenizer)
    return known[key]


def _wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template reads contents as lists of parts only, as some multimodal models do."""
    parts = [{"type": "text", "text": _PROBE}]
    return not _writes(tokenizer, [{"role": "user", "content": _PROBE}]) and _writes(
        tokenizer, [{"role": "user", "content": parts}]
    )


def _wants_text_arguments(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template reads the arguments of tool calls as JSON text only, as that of DeepSeek does."""
    call = {"type": "function", "function": {"name": _PROBE, "arguments": {"x": 1}}}
    found = []
    for form in (call, _with_text_arguments(call)):
        messages: list[Message] = [
            {"role": "user", "content": "a question"},
            {"role": "assistant", "content": "", "tool_calls": [form]},
        ]
        found.append(_writes(tokenizer, messages))
    return found == [False, True]


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def _writes(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    try:
        text = render_template(tokenizer, messages)
    except ValueError:
        return False
    return _PROBE in text and "'type'" not in text  # some print lists as Python does
