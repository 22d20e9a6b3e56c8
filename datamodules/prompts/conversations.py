"""Conversations: parse an instruction with its response, or a chat, from a row of the user's data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gatera_lightning.datamodules.prompts.chat_template import Message

COLUMNS = ("instruction", "input", "output", "messages")
"""Columns of a row: either ``instruction``, ``output`` and optionally ``input``, or ``messages``."""

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Instruction:
    """An instruction and its response."""

    request: str

    context: str
    """What the request is about; may be empty."""

    response: str


@dataclass(frozen=True)
class Chat:
    """The messages of a chat, optionally with a system message first. The last message is the response."""

    messages: tuple[Message, ...]

    @property
    def response(self) -> str:
        """Content of the last message."""
        return self.messages[-1]["content"]


def parse_conversation(row: Any, columns: Mapping[str, str]) -> Instruction | Chat:
    """Parse a row as an instruction or a chat. Surrounding white space is removed from all texts.

    >>> parse_conversation({"question": "Why?", "output": "So."}, {"instruction": "question"})
    Instruction(request='Why?', context='', response='So.')

    Args:
        row: A row of a dataset.
        columns: Names of the columns in ``row`` that are not called as in :data:`COLUMNS`: ``{column:
            name}``.

    Raises:
        ValueError: The row is neither an instruction nor a chat; the message says what was expected and what
            was found.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with columns, found {type(row).__name__}")
    names = {column: columns.get(column, column) for column in COLUMNS}
    fields = {column: row.get(name) for column, name in names.items()}
    if fields["messages"] is not None:
        if fields["instruction"] is not None and fields["output"] is not None:
            raise ValueError(
                f"columns {names['messages']!r} and {names['instruction']!r}: expected only one of the two"
            )
        return Chat(tuple(_parse_messages(fields["messages"])))
    for column in ("instruction", "output"):
        if names[column] not in row:
            alternative = "" if any(fields.values()) else f", and so is {names['messages']!r}"
            raise ValueError(
                f"column {names[column]!r} is missing{alternative}; the row has "
                f"{', '.join(map(str, row)) or 'no columns'}. "
                f"To read another column, set data.columns: {{{column}: NAME}}"
            )
    for column in ("instruction", "input", "output"):
        if not isinstance(fields[column], str) and fields[column] is not None:
            raise ValueError(f"column {names[column]!r}: expected text, found {fields[column]!r:.60}")
    request, context, response = (
        (fields[column] or "").strip() for column in ("instruction", "input", "output")
    )
    if not request or not response:
        raise ValueError(f"column {names['output' if request else 'instruction']!r} is empty")
    return Instruction(request, context, response)


def _parse_messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages: expected a list of objects with role and content, found {value!r:.60}")
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = ", ".join(map(str, message)) if isinstance(message, dict) else repr(message)
            raise ValueError(f"message {number}: expected an object with role and content, found {found:.60}")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise ValueError(f"message {number}: role {role!r} is unknown; accepted: {', '.join(_ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}): expected text as content, found {content!r:.60}")
        if role == "system" and number > 1:
            raise ValueError(f"message {number}: only the first message may be a system message")
        messages.append({"role": role, "content": content.strip()})
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if not turns or turns[-1] != "assistant":
        raise ValueError(
            f"the last message has role {messages[-1]['role']!r}; expected 'assistant', the response"
        )
    if turns[0] != "user":
        raise ValueError(f"the first message after the system message has role {turns[0]!r}; expected 'user'")
    return messages
