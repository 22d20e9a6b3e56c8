"""Placeholders for all texts of a conversation, with which a chat template can be checked for omissions."""

from collections.abc import Hashable, Sequence
from typing import Any

from gatera_lightning.datamodules.prompts.template_messages import Message

PLACEHOLDER_TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": f"function_{number}",
            "description": f"what tool {number} does",
            "parameters": {
                "type": "object",
                "properties": {f"parameter_{number}": {"type": "string", "description": f"value {number}"}},
                "required": [f"parameter_{number}"],
            },
        },
    }
    for number in (1001, 1002)
)
"""Two tools, as JSON schemas."""


def structure(messages: Sequence[Message]) -> Hashable:
    """Return what :func:`placeholder_messages` keeps of a conversation: roles, and which parts there are."""
    return tuple(
        (
            message["role"],
            bool(message["content"].strip()),
            tuple(bool(call["function"]["arguments"]) for call in message.get("tool_calls", ())),
            *("name" in message, "tool_call_id" in message, "reasoning_content" in message),
        )
        for message in messages
    )


def placeholder_messages(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with another text, which occurs once, in the place of each of its own.

    Calls and their results keep referring to each other. Ids have nine letters and digits, as some templates
    demand.
    """
    names: dict[str, str] = {}  # name of a function -> its placeholder
    ids: dict[str, str] = {}
    placeholders = []
    for number, message in enumerate(messages, 101):
        text = f"text number {number} here" if message["content"].strip() else ""
        probe: Message = {"role": message["role"], "content": text}
        if "reasoning_content" in message:
            probe["reasoning_content"] = f"thought number {number} here"
        calls = []
        for index, call in enumerate(message.get("tool_calls", ()), 10):
            function = call["function"]
            names[function["name"]] = f"function_{number}_{index}"
            arguments = {f"argument_{number}_{index}": f"value {number} {index}"}
            calls.append(
                {
                    "type": "function",
                    "function": {
                        "name": names[function["name"]],
                        "arguments": arguments if function["arguments"] else {},
                    },
                }
            )
            if "id" in call:
                ids[call["id"]] = f"call{number}{index}"
                calls[-1]["id"] = ids[call["id"]]
        if calls:
            probe["tool_calls"] = calls
        if "name" in message:
            probe["name"] = names.get(message["name"], f"name_{number}")
        if "tool_call_id" in message:
            probe["tool_call_id"] = ids.get(message["tool_call_id"], f"call{number}99")
        placeholders.append(probe)
    return placeholders
