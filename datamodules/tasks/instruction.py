"""The user's own data: instructions with responses, or chats."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.conversation_prompts import ConversationPrompts
from gatera_lightning.datamodules.prompts.conversations import COLUMNS, Chat, parse_conversation
from gatera_lightning.datamodules.tasks.base import TaskDataModule
from gatera_lightning.errors import ConfigError


class InstructionDataModule(TaskDataModule):
    """Rows with ``instruction``, ``output`` and optionally ``input``, or with ``messages``.

    Responses have no single correct wording. They are evaluated by their likelihood, and generated responses
    by text metrics.
    """

    free_text = True
    tasks = ("calendar",)
    sample_tasks = ("calendar",)

    def __init__(self, *, columns: dict[str, str] | None = None, **common: Any) -> None:
        """Set the names of the columns. A file may contain both instructions and chats.

        Args:
            columns: Names of your columns, if they are not called instruction, input, output and messages (a
                list of objects with role and content): {instruction: question, output: answer}.
            common: Settings of :class:`TaskDataModule`.
        """
        super().__init__(**common)
        self.columns = columns or {}
        self._prompts: ConversationPrompts | None = None
        self._missing_columns: set[str] = set()

    def problems(self, stage: str) -> list[str]:
        """Return every problem of the settings; see :meth:`TaskDataModule.problems`."""
        found = super().problems(stage)
        if unknown_columns := [name for name in self.columns if name not in COLUMNS]:
            found.append(
                f"data.columns: {', '.join(unknown_columns)} is unknown; accepted: {', '.join(COLUMNS)}"
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
        yield from super().examples(split)
        if self._missing_columns:
            names = ", ".join(
                f"{column}: {name}" for column, name in self.columns.items() if name in self._missing_columns
            )
            raise ConfigError(f"data.columns: {names}, but no row of data.{split} has that column")

    def example(self, row: dict[str, Any], task: str) -> Example:
        """Build the prompt and the response of a row; see :meth:`TaskDataModule.example`."""
        if self._prompts is None:
            raise RuntimeError("the data module has no tokenizer yet: call connect(tokenizer) first")
        conversation = parse_conversation(row, self.columns)
        self._missing_columns.difference_update(row)
        prompt = self._prompts.render(conversation, self.max_length)
        if isinstance(conversation, Chat):
            texts = [message["content"] for message in conversation.messages]
        else:
            texts = [conversation.request, conversation.context, conversation.response]
        return Example(
            prompt.text,
            [prompt.answer],
            0,
            task,
            labels=[conversation.response],
            identity="\n".join(texts),
            request="\n".join(texts[:-1]),
            chat=self.template == "chat",
            earlier_responses=prompt.earlier_responses,
            truncated=prompt.truncated,
        )
