"""The user's own data: instructions with responses, chats, or plain texts."""

import json
import logging
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.conversation_prompts import ConversationPrompts
from gatera_lightning.datamodules.prompts.conversations import (
    COLUMNS,
    Chat,
    Instruction,
    PlainText,
    parse_conversation,
    row_shape,
    similar_column,
)
from gatera_lightning.datamodules.prompts.messages import EmptyResponseError
from gatera_lightning.datamodules.prompts.template_messages import Message
from gatera_lightning.datamodules.prompts.unread_columns import SHAPES, unread_columns
from gatera_lightning.datamodules.settings import shown
from gatera_lightning.datamodules.tasks.base import TaskDataModule, UnusableRow
from gatera_lightning.datamodules.tokenization.control_tokens import unescape
from gatera_lightning.errors import ConfigError, near_miss

log = logging.getLogger(__name__)


class InstructionDataModule(TaskDataModule):
    """Rows with an instruction and its response, a chat, or a plain text, in any of the field's shapes.

    Responses have no single correct wording. They are evaluated by their likelihood, and generated responses
    by text metrics.
    """

    free_text = True
    tasks = ("calendar",)
    sample_tasks = ("calendar",)

    def __init__(self, *, columns: dict[str, str] | None = None, **common: Any) -> None:
        """Set the names of the columns. A file may contain both instructions and chats.

        Args:
            columns: Names of your columns, if they are not called instruction, input, output, system and
                history; messages or conversations, and tools; prompt and completion; or text:
                {instruction: question, output: answer}.
            common: Settings of :class:`TaskDataModule`.
        """
        super().__init__(**common)
        self.columns = columns or {}
        self._prompts: ConversationPrompts | None = None
        self._missing_columns: set[str] = set()
        self._plain_texts = 0
        self._unanswered = 0
        self._seen_columns: set[str] = set()
        self._unread_columns: set[tuple[str, str]] = set()

    def problems(self, stage: str) -> list[str]:
        """Return every problem of the settings; see :meth:`TaskDataModule.problems`."""
        found = super().problems(stage)
        if not isinstance(self.columns, dict) or not all(
            isinstance(name, str) for pair in self.columns.items() for name in pair
        ):
            return [*found, f"data.columns: {shown(self.columns)}; accepted: {{column: name of yours}}"]
        if unknown_columns := [name for name in self.columns if name not in COLUMNS]:
            found.append(
                f"data.columns: {', '.join(unknown_columns)} is unknown; accepted: {', '.join(COLUMNS)}"
                f"{near_miss(unknown_columns[0], COLUMNS)}"
            )
        if self.rank_validation:
            found.append(
                "data.rank_validation: true, but every example has a single response, "
                "which always ranks first; accepted: false"
            )
        return found

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the backbone's tokenizer; see :meth:`TaskDataModule.connect`."""
        super().connect(tokenizer)
        locate = self.train_on == "every_response"
        self._prompts = ConversationPrompts(self.template, tokenizer, locate_earlier_responses=locate)

    def examples(self, split: str) -> Iterator[Example]:
        """Yield the examples of a split; see :meth:`TaskDataModule.examples`.

        Raises:
            ConfigError: No row has a column that ``columns`` names, which would otherwise be missing
                silently.
        """
        self._missing_columns = set(self.columns.values())
        self._plain_texts = self._unanswered = 0
        for example in super().examples(split):
            if not example.prompt and split == "test" and "generation" in self.evaluate_by:
                raise ConfigError(
                    f"{example.place}: a text without a prompt, after which nothing can be generated; "
                    "accepted data.evaluate_by: likelihood"
                )
            yield example
        if self._plain_texts:
            log.info(
                "data.%s: %d plain texts (text, or prompt and completion) stay as they are; data.template "
                "%s does not change them. Ask the adapter with --template none",
                split,
                self._plain_texts,
                self.template,
            )
        if self._unanswered:
            log.warning(
                "data.%s: %d chats end in messages without a response, which are left out",
                split,
                self._unanswered,
            )
        if self._missing_columns:
            names = ", ".join(
                f"{column}: {name}" for column, name in self.columns.items() if name in self._missing_columns
            )
            raise ConfigError(f"data.columns: {names}, but no row of data.{split} has that column")

    def example(self, row: dict[str, Any], task: str) -> Example:
        """Build the prompt and the response of a row; see :meth:`TaskDataModule.example`."""
        if not isinstance(row, dict):
            raise ValueError(f"the row is {row!r:.60}; accepted: an object of fields")
        if self._prompts is None:
            raise RuntimeError("the data module has no tokenizer yet: call connect(tokenizer) first")
        self._missing_columns.difference_update(row)
        self._report_similar_columns(row)
        try:
            conversation = parse_conversation(row, self.columns)
        except EmptyResponseError as error:
            raise UnusableRow(str(error)) from error
        self._report_unread_columns(row)
        prompt = self._prompts.render(conversation, self.max_length)
        if isinstance(conversation, Chat):
            self._unanswered += conversation.unanswered
            if self.train_on == "all" and any("weight" in message for message in conversation.messages):
                raise ValueError(
                    "a message has weight 0, but train_on all trains on every message; accepted: response, "
                    "every_response"
                )
            texts = [_identifying_text(message) for message in conversation.messages]
        elif isinstance(conversation, Instruction):
            texts = [conversation.request, conversation.context, conversation.response]
        else:
            self._plain_texts += 1
            texts = [conversation.prompt, conversation.response]
        return Example(
            prompt.text,
            [prompt.answer],
            0,
            task,
            labels=[conversation.response.strip() or unescape(prompt.answer).strip()],
            identity="\n".join(texts),
            request="\n".join(texts[:-1]),
            chat=self.template == "chat" and not isinstance(conversation, PlainText),
            earlier_responses=prompt.earlier_responses,
            truncated=prompt.truncated,
        )

    def _report_similar_columns(self, row: Any) -> None:
        """Warn once about each column that is not read, but has nearly the name of one that is."""
        for name in row if isinstance(row, dict) else ():
            if name in self._seen_columns or name in self.columns.values():
                continue
            self._seen_columns.add(name)
            if (column := similar_column(str(name))) is not None:
                log.warning(
                    "column %r is not read; did you mean %r? To read it, set data.columns: {%s: %s}",
                    *(name, column, column, name),
                )

    def _report_unread_columns(self, row: dict[str, Any]) -> None:
        """Warn once about each column that means something in rows of another shape."""
        shape = row_shape(row, self.columns)
        others = {name: value for name, value in row.items() if name not in self.columns.values()}
        for name in unread_columns(others, COLUMNS, shape):
            if (shape, name) not in self._unread_columns:
                self._unread_columns.add((shape, name))
                log.warning("column %r is not read in %s", name, SHAPES[shape])


def _identifying_text(message: Message) -> str:
    calls = message.get("tool_calls")
    return str(message["content"]) + (json.dumps(calls, sort_keys=True) if calls else "")
