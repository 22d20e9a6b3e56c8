"""Columns that the shape of a row does not read, but that would change what is learned: they are refused."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from gatera_lightning.errors import near_miss

Shape = Literal["chat", "instruction", "completion", "text"]

SHAPES: dict[Shape, str] = {
    "chat": "a chat",
    "instruction": "an instruction",
    "completion": "a prompt and a completion",
    "text": "a text",
}

_UNSUPPORTED = {
    **dict.fromkeys(("images", "image", "videos", "audios"), "images, videos and sound"),
    **dict.fromkeys(("functions", "function_call"), "functions (give them as 'tools')"),
    **dict.fromkeys(("documents", "chat_template_kwargs"), "other inputs of a chat template"),
    **dict.fromkeys(("completion_mask", "assistant_masks", "loss_mask"), "masks of tokens"),
    **dict.fromkeys(("reasoning_content", "tool_calls"), "keys of a message beside messages"),
}
"""Columns that mean something for other trainers, and what they would add."""

_WEIGHTS = ("weight", "loss_weight", "sample_weight", "example_weight")
_PREFERENCES = ("chosen", "rejected")
_LABELS = ("label", "kto_tag")  # whether a response is desirable
_THOUGHTS = ("reasoning", "thinking")  # they mean something in a message, and elsewhere anything

PREFERENCE_PROBLEM = "columns 'chosen' and 'rejected': pairs of responses to prefer from are not supported"


def check_unread(row: Mapping[str, Any], get: Callable[[str], Any], shape: Shape, *, answered: bool) -> None:
    """Refuse a column that the shape of a row does not read and that would change what is learned.

    Args:
        row: The columns under their own names, without those that ``data.columns`` renames.
        get: The value of a column of :data:`~gatera_lightning.datamodules.prompts.conversations.COLUMNS`.
        shape: The shape of the row.
        answered: Whether no message is left without a response.

    Raises:
        ValueError: With the column, its value and what is accepted.
    """
    check_weights(row)
    for column in ("input", "history"):
        if shape != "instruction" and _holds(get(column)):
            raise _unread(column, get(column), shape, "it in a row with an instruction and an output")
    if shape == "completion" and _holds(get("instruction")):
        column = "instruction"
        raise _unread(column, get(column), shape, "it as a part of the prompt, or with an output")
    preferences = [column for column in _PREFERENCES if _holds(row.get(column))]
    if preferences and (shape != "chat" or not answered):
        raise ValueError(PREFERENCE_PROBLEM)
    for column in ("output", "completion"):
        if shape == "chat" and not answered and _holds(get(column)):
            raise _unread(column, get(column), shape, "it as the last message, where a response is missing")
    for column in _LABELS if shape == "completion" else _LABELS[1:]:
        if str(row.get(column)).lower() in ("true", "false"):
            raise ValueError(
                f"column {column!r}: {row[column]!r}; labels of desirable responses are not supported; "
                "accepted: rows whose responses are all desirable, without this column"
            )


def check_weights(row: Mapping[str, Any]) -> None:
    """Refuse a weight of a whole row, because every row counts by its tokens.

    Raises:
        ValueError: With the column and its value.
    """
    for column in _WEIGHTS:
        value = row.get(column)
        if _holds(value) and value not in (1, "1", "1.0"):
            raise ValueError(
                f"column {column!r}: {value!r:.60}; accepted: 1, or 'weight' 0 or 1 in assistant messages, "
                "because rows have no weights of their own"
            )


def check_task_row(row: Mapping[str, Any]) -> None:
    """Refuse what a row of a task with a fixed prompt does not read: a weight, and what precedes a question.

    Raises:
        ValueError: With the column and its value.
    """
    check_weights(row)
    for column in ("system", "history", "tools"):
        if _holds(row.get(column)):
            raise ValueError(
                f"column {column!r}: {row[column]!r:.60}; accepted: none, because this task has its own "
                "prompt (InstructionDataModule reads it)"
            )


def check_supported(row: Mapping[str, Any], accepted: Sequence[str]) -> None:
    """Refuse a column that no shape reads although it means something.

    Raises:
        ValueError: With the column and the accepted ones.
    """
    for name, meaning in _UNSUPPORTED.items():
        if row.get(name) and _holds(row[name]):
            raise ValueError(
                f"column {name!r}: {meaning} are not supported; accepted columns: {', '.join(accepted)}"
                f"{near_miss(name, accepted)}"
            )


def unread_columns(row: Mapping[str, Any], columns: Iterable[str], shape: Shape) -> list[str]:
    """Return the columns of a valid row that mean something in another shape, and are not read in this one.

    Args:
        row: As for :func:`check_unread`.
        columns: Columns that some shape reads.
        shape: The shape of the row.
    """
    read = _READ[shape]
    known = [*(column for column in columns if column not in read), *_PREFERENCES, *_THOUGHTS]
    return [column for column in known if _holds(row.get(column))]


_READ: dict[Shape, tuple[str, ...]] = {
    "chat": ("messages", "conversations", "system", "tools"),
    "instruction": ("instruction", "input", "output", "history", "system", "tools"),
    "completion": ("prompt", "completion", "system", "tools"),
    "text": ("text",),
}


def _holds(value: Any) -> bool:
    """Whether a column holds anything; CSV and Arrow write nothing in several ways."""
    if isinstance(value, str):
        return bool(value.strip())
    return not (value is None or value in ([], {}) or value != value)  # the last is NaN


def _unread(column: str, value: Any, shape: Shape, accepted: str) -> ValueError:
    return ValueError(
        f"column {column!r}: {value!r:.60}, but the row is {SHAPES[shape]}, which does not read it; "
        f"accepted: {accepted}, or rows without it"
    )
