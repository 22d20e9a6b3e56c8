"""Conversations: parse an instruction with its response, a chat or a plain text from a row of data."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gatera_lightning.datamodules.prompts.messages import (
    EmptyResponseError,
    ends_unanswered,
    parse_json_list,
    parse_messages,
    parse_text,
    parse_tools,
)
from gatera_lightning.datamodules.prompts.template_messages import Message
from gatera_lightning.datamodules.prompts.unread_columns import (
    PREFERENCE_PROBLEM,
    Shape,
    check_supported,
    check_unread,
)
from gatera_lightning.errors import near_miss

COLUMNS = (
    *("instruction", "input", "output", "messages"),
    *("system", "history", "conversations", "tools", "prompt", "completion", "text"),
)
"""Columns of a row. Its shape is the first of these that it has: ``messages`` or ``conversations``;
``instruction`` and ``output``, optionally with ``input`` and ``history``; ``prompt`` and ``completion``;
``text``. ``system`` and ``tools`` belong to all but the last."""

_LISTS = ("messages", "conversations", "tools", "history")


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

    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the tools that the model may call."""

    unanswered: bool = False
    """True if messages after the last response were left out, because nobody answers them."""

    @property
    def response(self) -> str:
        """Content of the last message."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class PlainText:
    """A text that no template changes."""

    prompt: str
    """The beginning, which is not a part of the response; may be empty."""

    response: str


Conversation = Instruction | Chat | PlainText


def parse_conversation(row: Any, columns: Mapping[str, str]) -> Conversation:
    """Parse a row as an instruction, a chat or a plain text. Texts keep their white space.

    >>> parse_conversation({"question": "Why?", "output": "So."}, {"instruction": "question"})
    Instruction(request='Why?', context='', response='So.')

    Args:
        row: A row of a dataset.
        columns: Names of the columns in ``row`` that are not called as in :data:`COLUMNS`: ``{column:
            name}``.

    Raises:
        EmptyResponseError: The row has no response to train on.
        ValueError: The row has none of the shapes; the message says what was expected and what was found.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with columns, found {type(row).__name__}")
    fields = _Fields(row, columns)
    check_supported(fields.of_others(), COLUMNS)
    shape, column = _shape(fields)
    conversation = _parse_shape(fields, shape, column)
    answered = not (isinstance(conversation, Chat) and conversation.unanswered)
    check_unread(fields.of_others(), fields.__getitem__, shape, answered=answered)
    return conversation


def row_shape(row: Mapping[str, Any], columns: Mapping[str, str]) -> Shape:
    """Return the shape of a row that :func:`parse_conversation` accepts; the arguments are the same."""
    return _shape(_Fields(row, columns))[0]


def similar_column(name: str) -> str | None:
    """Return the column that a column of another name resembles; None if it resembles none.

    >>> similar_column("system_prompt"), similar_column("inputs"), similar_column("source")
    ('system', 'input', None)
    """
    if name in COLUMNS:
        return None
    if name in ("system_prompt", "system_message"):
        return "system"
    return next(iter(difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.8)), None)


def _shape(fields: "_Fields") -> tuple[Shape, str]:
    """The shape of a row, and the column that decides it."""
    chats = [column for column in ("messages", "conversations") if fields[column] is not None]
    is_instruction = fields["instruction"] is not None and fields["output"] is not None
    if len(chats) > 1 or (chats and is_instruction):
        first, second = [*chats, "instruction"][:2]
        raise ValueError(
            f"columns {fields.name(first)!r} and {fields.name(second)!r}: expected only one of the two"
        )
    if chats:
        return "chat", chats[0]
    if is_instruction:
        return "instruction", "instruction"
    if fields["prompt"] is not None and fields["completion"] is not None:
        return "completion", "prompt"
    if isinstance(fields["text"], str) and fields["instruction"] is None:
        return "text", "text"
    if any(fields.row.get(fields.name(name)) == [] for name in ("messages", "conversations")):
        raise ValueError(
            f"{fields.name('messages')}: expected a list of objects with role and content, found []"
        )
    for column in ("instruction", "output"):
        if fields.name(column) not in fields.row:
            raise fields.missing(column)
    return "instruction", "instruction"


class _Fields:
    """The columns of a row under the names that this project gives them."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.row = row
        self._names = dict(columns)
        renamed = set(columns.values())  # such a column means what `columns` says, whatever its name is
        self._hidden = {column for column in COLUMNS if column in renamed and column not in columns}

    def name(self, column: str) -> str:
        """The name of a column in the row."""
        return self._names.get(column, column)

    def __getitem__(self, column: str) -> Any:
        value = None if column in self._hidden else self.row.get(self.name(column))
        return None if value in ("", []) and column in _LISTS else value  # CSV has no null

    def text(self, column: str) -> str:
        """The text of a column; empty if there is none.

        Raises:
            ValueError: It is neither text nor a number.
        """
        value = self[column]
        return "" if value is None else parse_text(value, f"column {self.name(column)!r}")

    def of_others(self) -> dict[str, Any]:
        """The columns that no setting names."""
        return {name: value for name, value in self.row.items() if name not in self._names.values()}

    def check_no_chat_columns(self, column: str) -> None:
        """Raise ValueError if a row whose texts stay as they are has a system message or tools."""
        for other in ("system", "tools"):
            if self[other] and str(self[other]).strip():
                raise ValueError(
                    f"column {self.name(column)!r} is a text, which takes no {self.name(other)!r}; accepted: "
                    "messages, an instruction, or a prompt and a completion as lists of messages"
                )

    def missing(self, column: str) -> ValueError:
        """The error for a column that is not in the row."""
        if self.row.get("chosen") or self.row.get("rejected"):
            return ValueError(f"{PREFERENCE_PROBLEM}; accepted columns: {', '.join(COLUMNS)}")
        others = any(self[name] is not None for name in ("instruction", "input", "output"))
        alternative = "" if others else f", and so is {self.name('messages')!r}"
        typo = ""
        for name in self.row:
            if near_miss(name, COLUMNS) and name not in COLUMNS:
                typo = f" (column {name!r}{near_miss(name, COLUMNS).replace('; ', ': ')})"
                break
        return ValueError(
            f"column {self.name(column)!r} is missing{alternative}; the row has "
            f"{', '.join(map(str, self.row)) or 'no columns'}{typo}. "
            f"To read another column, set data.columns: {{{column}: NAME}}"
        )


def _parse_shape(fields: _Fields, shape: Shape, column: str) -> Conversation:
    if shape == "chat":
        return _parse_chat(fields, column)
    if shape == "completion":
        return _parse_completion(fields)
    if shape == "text":
        fields.check_no_chat_columns("text")
        return _parse_plain_text("", fields["text"], fields.name("text"))
    return _parse_instruction(fields)


def _parse_instruction(fields: _Fields) -> Instruction | Chat:
    request, context, response = (fields.text(column) for column in ("instruction", "input", "output"))
    if not request.strip():
        raise ValueError(f"column {fields.name('instruction')!r} is empty")
    if not response.strip():
        raise EmptyResponseError(f"column {fields.name('output')!r} is empty")
    context = context if context.strip() else ""
    history, tools = _parse_history(fields), parse_tools(fields["tools"])
    if not (history or tools or fields.text("system").strip()):
        return Instruction(request, context, response)
    content = f"{request}\n\n{context}" if context else request
    turn = [{"role": "user", "content": content}, {"role": "assistant", "content": response}]
    return Chat(tuple(_with_system(fields, [*history, *turn])), tools)


def _parse_history(fields: _Fields) -> list[Message]:
    """Earlier turns of an instruction: pairs of a request and a response."""
    history: list[Message] = []
    name = fields.name("history")
    pairs = parse_json_list(fields["history"])
    if pairs is not None and not isinstance(pairs, list):
        raise ValueError(f"column {name!r}: expected a list of pairs of texts, found {pairs!r:.60}")
    for number, pair in enumerate(pairs or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"column {name!r}, turn {number}: expected a pair of texts, found {pair!r:.60}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            content = parse_text(text, f"column {name!r}, turn {number}")
            if not content.strip():
                raise ValueError(f"column {name!r}, turn {number}: a text is empty")
            history.append({"role": role, "content": content})
    return history


def _parse_chat(fields: _Fields, column: str) -> Chat:
    messages = parse_messages(fields[column], fields.name(column))
    return Chat(
        tuple(_with_system(fields, messages)),
        parse_tools(fields["tools"]),
        unanswered=ends_unanswered(fields[column]),
    )


def _with_system(fields: _Fields, messages: list[Message]) -> list[Message]:
    """The messages after the row's own system message, if it has one."""
    system = fields.text("system")
    if not system.strip():
        return messages
    if messages[0]["role"] == "system":
        raise ValueError(f"column {fields.name('system')!r}, and the first message is a system message too")
    return [{"role": "system", "content": system}, *messages]


def _parse_completion(fields: _Fields) -> Chat | PlainText:
    prompt, completion = (_messages_or_text(fields[column]) for column in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = parse_messages([*prompt, *completion], fields.name("completion"))
        return Chat(
            tuple(_with_system(fields, messages)),
            parse_tools(fields["tools"]),
            unanswered=ends_unanswered(completion),
        )
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError(
            f"columns {fields.name('prompt')!r} and {fields.name('completion')!r}: one is a list of messages "
            "and the other is not; expected two texts, or two lists"
        )
    fields.check_no_chat_columns("prompt")
    text = parse_text(prompt, f"column {fields.name('prompt')!r}")
    if not text.strip():
        raise ValueError(f"column {fields.name('prompt')!r} is empty")
    return _parse_plain_text(text, completion, fields.name("completion"))


def _messages_or_text(value: Any) -> Any:
    """The messages that a JSON text holds; any other value as it is, such as the text ``[{"x": 1}]``."""
    try:
        found = parse_json_list(value)
    except ValueError:  # a text that is nearly JSON
        return value
    is_list = isinstance(found, list) and all(
        isinstance(item, dict) and item.keys() & {"role", "from"} for item in found
    )
    return found if is_list and found else value


def _parse_plain_text(prompt: str, value: Any, name: str) -> PlainText:
    text = parse_text(value, f"column {name!r}")
    if not text.strip():
        raise EmptyResponseError(f"column {name!r} is empty")
    return PlainText(prompt, text)
