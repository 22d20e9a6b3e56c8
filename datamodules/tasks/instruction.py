"""People's own data: instructions with responses, or chats, from any file of rows or from the hub."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.conversations import (
    COLUMNS,
    Chat,
    ConversationPrompts,
    parse_conversation,
)
from gatera_lightning.datamodules.tasks.base import TaskFamily
from gatera_lightning.errors import ConfigError


class OwnDataModule(TaskFamily):
    """Rows with ``instruction``, ``input`` (may be absent) and ``output``, or with ``messages``; the response is learned.

    A response is judged by its likelihood, or, generated, by metrics of text: nothing is right or wrong.
    """

    free_text = True
    tasks = ("calendar",)
    sample_tasks = ("calendar",)

    def __init__(self, *, columns: dict[str, str] | None = None, **family: Any) -> None:
        """Instruction rows, or chats as lists of messages with role and content; both kinds may stand in one file.

        Args:
            columns: What the columns of your rows are called, where that is not instruction, input, output or messages:
                {instruction: question, output: answer}.
            family: Template, sources and what else every family can be told: see :class:`TaskFamily`.
        """
        super().__init__(**family)
        self.columns = columns or {}
        self._prompts: ConversationPrompts | None = None
        self._unseen: set[str] = set()

    def problems(self, stage: str) -> list[str]:
        """Everything about these settings that cannot work, missing files included; reads no rows."""
        found = super().problems(stage)
        if unknown := [name for name in self.columns if name not in COLUMNS]:
            found.append(f"data.columns: {', '.join(unknown)} is unknown; accepted: {', '.join(COLUMNS)}")
        if self.rank_validation:
            found.append(
                "data.rank_validation: true, and a row has one response, which always ranks first; accepted: false"
            )
        return found

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the data the backbone's tokenizer. Raises ConfigError when it lacks the chat template that is asked for."""
        super().connect(tokenizer)
        self._prompts = ConversationPrompts(
            self.template, tokenizer, earlier=self.train_on == "every_response"
        )

    def examples(self, split: str) -> Iterator[Example]:
        """As every family. Raises ConfigError when no row has a column that ``columns`` names, which would drop it silently."""
        self._unseen = set(self.columns.values())
        yield from super().examples(split)
        if self._unseen:
            names = ", ".join(
                f"{column}: {name}" for column, name in self.columns.items() if name in self._unseen
            )
            raise ConfigError(f"data.columns: {names}, and no row of data.{split} has that column")

    def example(self, row: dict[str, Any], task: str) -> Example:
        """Prompt and response of a row; a chat's earlier responses are trained on with ``train_on: every_response``."""
        if self._prompts is None:
            raise RuntimeError("the data module has no tokenizer yet: call connect(tokenizer) first")
        conversation = parse_conversation(row, self.columns)
        self._unseen.difference_update(row)
        prompt = self._prompts.fitting(conversation, self.max_length)
        said = (
            [message["content"] for message in conversation.messages]
            if isinstance(conversation, Chat)
            else [conversation.request, conversation.context, conversation.response]
        )
        return Example(
            prompt.text,
            [prompt.answer],
            0,
            task,
            labels=[conversation.response],
            identity="\n".join(said),
            chat=self.template == "chat",
            earlier_responses=prompt.earlier,
            truncated=prompt.shortened,
        )
