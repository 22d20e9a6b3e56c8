"""Messages of a chat, as OpenAI, ShareGPT and the Hugging Face libraries write them."""

import json
import math
from collections.abc import Mapping
from typing import Any

from gatera_lightning.datamodules.prompts.template_messages import Message
from gatera_lightning.datamodules.sources.strict_json import parse_json
from gatera_lightning.errors import near_miss

ROLES = ("system", "user", "assistant", "developer", "tool")
"""Roles of messages; a developer message is a system message."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", *_REASONING_KEYS)


class EmptyResponseError(ValueError):
    """A row without a response to train on, which is skipped, unlike a malformed one."""


def parse_messages(value: Any, column: str = "messages") -> list[Message]:
    """Parse the messages of a chat, up to its last response that has a weight.

    Args:
        value: A list of objects with role and content (or from and value), or JSON text of one.
        column: Name of the column.

    Raises:
        EmptyResponseError: No response is left to train on.
        ValueError: The messages are malformed; the message says what was expected and what was found.
    """
    found = parse_json_list(value)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{column}: expected a list of objects with role and content, found {value!r:.60}")
    messages = [_parse_message(message, number) for number, message in enumerate(found, 1)]
    for number, message in enumerate(messages, 1):
        if message["role"] == "system" and number > 1:
            raise ValueError(f"message {number}: only the first message may be a system message")
        is_empty = not message["content"].strip() and not message.get("tool_calls")
        may_be_empty = message["role"] in ("system", "tool") or (
            message["role"] == "assistant" and number == len(messages)
        )
        if is_empty and not may_be_empty:
            raise ValueError(
                f"message {number} ({message['role']}): expected text as content, "
                f"found {message['content']!r:.60}"
            )
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise ValueError("no message has role 'user'; expected at least one")
    if "assistant" not in roles:
        raise ValueError("no message has role 'assistant'; expected at least one, the response")
    while messages and (messages[-1]["role"] != "assistant" or messages[-1].get("weight") == 0):
        messages.pop()
    if not messages:
        raise EmptyResponseError("every assistant message has weight 0")
    if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
        raise EmptyResponseError(f"message {len(messages)} (assistant), the response, is empty")
    if "user" not in [message["role"] for message in messages]:
        raise EmptyResponseError("every assistant message after the first user message has weight 0")
    return messages


def ends_unanswered(value: Any) -> bool:
    """Return whether messages that :func:`parse_messages` accepts end in a request without a response."""
    last = parse_json_list(value)[-1]
    return (last["role"] if "role" in last else _SHAREGPT_ROLES[last["from"]]) != "assistant"


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Parse the tools of a row: a list of JSON schemas, or JSON text of one.

    Raises:
        ValueError: They are something else.
    """
    tools = _json(value, "tools") if isinstance(value, str) else value
    tools = [] if tools is None else tools
    if not isinstance(tools, list):
        raise ValueError(f"tools: expected a list of JSON schemas, found {value!r:.60}")
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tools: tool {number} has no name; expected a JSON schema, found {tool!r:.60}")
    check_texts(tools, "tools")
    return tuple(tools)


def parse_json_list(value: Any) -> Any:
    """Return the list that a JSON text holds, or the value itself; Parquet and CSV hold lists as text.

    Raises:
        ValueError: The text is JSON with a key twice, half of a surrogate pair, or too deep a nesting.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    found = _json(value, "a JSON text")
    return found if isinstance(found, list) else value


def parse_text(value: Any, where: str) -> str:
    """Return a text; numbers are written as text.

    Raises:
        ValueError: The value is something else, or no character set can represent it.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, found {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {value!r:.60} has half of a character (a lone surrogate); expected text"
        ) from error
    return value


def check_texts(value: Any, where: str) -> None:
    """Raise ValueError if a text inside a JSON value has half of a surrogate pair."""
    if isinstance(value, str):
        parse_text(value, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_texts(key, where)
            check_texts(item, where)
    elif isinstance(value, list):
        for item in value:
            check_texts(item, where)


def _parse_message(message: Any, number: int) -> Message:
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        message = _from_sharegpt(message, number)
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys() | _implied(message):
        found = ", ".join(map(str, message)) if isinstance(message, dict) else repr(message)
        raise ValueError(f"message {number}: expected an object with role and content, found {found:.60}")
    role = message["role"]
    if role not in ROLES:
        raise ValueError(
            f"message {number}: role {role!r} is unknown; accepted: {', '.join(ROLES)}"
            f"{near_miss(role, ROLES)}"
        )
    for key, value in message.items():
        if key not in _KEYS and value not in (None, "", [], {}):
            raise ValueError(
                f"message {number} ({role}): key {key!r} is unknown; accepted: {', '.join(_KEYS)}"
                f"{near_miss(key, _KEYS)}"
            )
    where = f"message {number} ({role})"
    parsed: Message = {
        "role": "system" if role == "developer" else role,
        "content": _parse_content(message.get("content"), bool(message.get("tool_calls")), where),
    }
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            parsed[key] = parse_text(message[key], f"{where}: {key}")
    reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)
    if reasoning is not None and parse_text(reasoning, f"{where}: reasoning_content").strip():
        parsed["reasoning_content"] = reasoning
    if message.get("tool_calls"):
        parsed["tool_calls"] = _parse_tool_calls(message["tool_calls"], where)
    if (weight := message.get("weight")) is not None:
        parsed |= _parse_weight(weight, role, where)
    misplaced = sorted(parsed.keys() & {"reasoning_content", "tool_calls"})
    if role != "assistant" and misplaced:
        raise ValueError(f"{where}: {', '.join(misplaced)}; accepted in assistant messages only")
    return parsed


def _implied(message: Mapping[str, Any]) -> set[str]:
    """The keys that a message may leave out: the content, next to tool calls."""
    return {"content"} if message.get("tool_calls") else set()


def _from_sharegpt(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    sender = message["from"]
    if not isinstance(sender, str) or sender not in _SHAREGPT_ROLES:
        raise ValueError(
            f"message {number}: from {sender!r} is unknown; accepted: {', '.join(_SHAREGPT_ROLES)}"
            f"{near_miss(sender, _SHAREGPT_ROLES)}"
        )
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    if others.keys() & {"role", "content"}:
        raise ValueError(f"message {number}: expected role and content or from and value, found both")
    content = message["value"]
    if sender == "function_call":
        where = f"message {number} (function_call)"
        calls = _json(content, where) if isinstance(content, str) else content
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": "", "tool_calls": calls} | others
    return {"role": _SHAREGPT_ROLES[sender], "content": content} | others


def _parse_content(content: Any, has_tool_calls: bool, where: str) -> str:
    """The text of a message; texts of parts are joined without anything between them."""
    if content is None and has_tool_calls:
        return ""
    if content is None:
        raise ValueError(f"{where}: expected text as content, found None")
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        if isinstance(content, list | dict | bool):
            raise ValueError(f"{where}: expected text as content, found {content!r:.60}")
        return parse_text(content, f"{where}: content")
    texts = []
    for part in content:
        kind = part.get("type")
        used = {key for key, value in part.items() if value is not None}
        if kind != "text" or used != {"type", "text"}:
            found = repr(kind) if kind != "text" else f"the keys {', '.join(sorted(used))}"
            raise ValueError(f"{where}: a part of its content has {found}; accepted: type 'text' with a text")
        texts.append(parse_text(part["text"], f"{where}: content"))
    return "".join(texts)


def _parse_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, as chat templates expect them."""
    calls = _json(calls, where) if isinstance(calls, str) else calls
    parsed = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: expected tool_calls with a function's name, found {call!r:.60}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{where}: arguments") if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            raise ValueError(
                f"{where}: expected arguments of {function['name']!r:.40} as an object or JSON text of one, "
                f"found {arguments!r:.60}"
            )
        check_texts(call, f"{where}: tool_calls")
        rest = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
        arguments = {} if arguments is None else arguments
        called = {"name": function["name"], "arguments": arguments}
        parsed.append({"type": "function"} | rest | {"function": called})
    return parsed


def _parse_weight(weight: Any, role: str, where: str) -> Message:
    """A weight of 0 as a part of the message; 1 is what every response has."""
    if isinstance(weight, str) or weight not in (0, 1):
        raise ValueError(f"{where}: weight {weight!r:.60}; accepted: 0, 1")
    if role != "assistant":
        if weight == 1:
            raise ValueError(f"{where}: weight 1; accepted: 0, because only responses are trained on")
        return {}
    return {"weight": 0} if weight == 0 else {}


def _json(text: str, where: str) -> Any:
    """The value of a JSON text; the text itself if it is none.

    Raises:
        ValueError: It is JSON with a key twice, half of a surrogate pair, or too deep a nesting.
    """
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        return text
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
