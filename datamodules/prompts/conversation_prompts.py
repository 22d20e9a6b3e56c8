"""Prompts of conversations: an instruction or a chat in any template, truncated by whole turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.prompts.chat_template import (
    Message,
    answer_suffix,
    end_of_turn,
    render_chat,
    supports_system_message,
)
from gatera_lightning.datamodules.prompts.conversations import Chat, Instruction
from gatera_lightning.datamodules.prompts.templates import Template, render
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_example

_PLAIN_SPEAKERS = {"system": "", "user": "User: ", "assistant": "Assistant: "}


@dataclass(frozen=True)
class Prompt:
    """A prompt and its response."""

    text: str

    answer: str
    """The response as it follows the prompt, with the white space that separates them."""

    earlier_responses: tuple[tuple[int, int], ...] = ()
    """Earlier responses of a chat, as character ranges of ``text``; empty if they were not located."""

    truncated: bool = False
    """True if the oldest turns were dropped."""


@dataclass(frozen=True)
class ConversationPrompts:
    """Renders conversations in one template, for one tokenizer."""

    template: Template
    tokenizer: PreTrainedTokenizerBase

    locate_earlier_responses: bool = False
    """Whether to fill in ``Prompt.earlier_responses``, which not every chat template allows."""

    def render(self, conversation: Instruction | Chat, max_length: int) -> Prompt:
        """Render a conversation, without the oldest turns of a chat if it is too long.

        The system message and the last turn are always included. If they exceed ``max_length`` on their own,
        :func:`tokenize_example` truncates the prompt by tokens.

        Args:
            conversation: The conversation; its response becomes the answer.
            max_length: Maximum number of tokens of prompt and response together.

        Raises:
            ValueError: The template is unknown, or cannot represent the chat.
        """
        if isinstance(conversation, Instruction):
            text, answers = render(
                self.template,
                conversation.request,
                [conversation.response],
                self.tokenizer,
                context=conversation.context,
            )
            return Prompt(text, answers[0])
        system = [message for message in conversation.messages if message["role"] == "system"]
        turns = conversation.messages[len(system) :]
        turn_starts = [i for i, message in enumerate(turns) if message["role"] == "user"]
        for start in turn_starts:
            prompt = self._render_chat([*system, *turns[start:]], truncated=start > 0)
            if start == turn_starts[-1] or self._fits(prompt, max_length):
                break
        return prompt

    def _fits(self, prompt: Prompt, max_length: int) -> bool:
        options: dict[str, Any] = {}
        if self.template == "chat":
            options = {"special_tokens": False, "answer_suffix": self._answer_suffix}
        tokenized = tokenize_example(self.tokenizer, prompt.text, [prompt.answer], max_length, **options)
        return not tokenized.truncated

    def _render_chat(self, messages: Sequence[Message], *, truncated: bool) -> Prompt:
        *history, response = messages
        if self.template == "chat":
            return self._render_chat_template(history, response, truncated)
        if self.template == "plain":
            return self._render_plain(history, response, truncated)
        if [message["role"] for message in history] not in (["user"], ["system", "user"]):
            raise ValueError(
                f"template {self.template} has a single turn, but the chat has {len(messages)} messages; "
                "accepted templates: chat, plain"
            )
        request = "\n\n".join(message["content"] for message in history)
        text, answers = render(self.template, request, [response["content"]], self.tokenizer)
        return Prompt(text, answers[0], (), truncated)

    def _render_chat_template(self, history: Sequence[Message], response: Message, truncated: bool) -> Prompt:
        if history[0]["role"] == "system" and not self._supports_system_message:
            system, first, *others = history
            content = f"{system['content']}\n\n{first['content']}"
            history = [{"role": "user", "content": content}, *others]
        text, separator = render_chat(self.tokenizer, history)
        earlier = self._locate_earlier_responses(history, text) if self.locate_earlier_responses else ()
        return Prompt(text, separator + response["content"], earlier, truncated)

    def _render_plain(self, history: Sequence[Message], response: Message, truncated: bool) -> Prompt:
        text, ranges = "", []
        for message in history:
            text += _PLAIN_SPEAKERS[message["role"]]
            content = message["content"]
            if message["role"] == "assistant":
                # Earlier responses end in EOS and start with the space before them, like the last one.
                content += self.tokenizer.eos_token
                ranges.append((len(text) - 1, len(text) + len(content)))
            text += content + "\n"
        earlier = tuple(ranges) if self.locate_earlier_responses else ()
        opening = _PLAIN_SPEAKERS["assistant"].rstrip()
        return Prompt(text + opening, f" {response['content']}", earlier, truncated)

    def _locate_earlier_responses(self, history: Sequence[Message], text: str) -> tuple[tuple[int, int], ...]:
        """Find the assistant's messages in a rendered chat, each with the token that ends its turn."""
        ranges = []
        for i, message in enumerate(history):
            if message["role"] != "assistant":
                continue
            opening = render_chat(self.tokenizer, history[:i])[0]
            start = text.find(message["content"], len(opening))
            if not text.startswith(opening) or start < 0 or text[len(opening) : start].strip():
                raise ValueError(
                    "train_on every_response: the tokenizer's chat template renders earlier responses "
                    "differently from the last one, so training on them would teach what the model never "
                    "generates; accepted: response, all"
                )
            end = start + len(message["content"])
            turn_end = end + len(text[end:]) - len(text[end:].lstrip())
            if self._end_of_turn and text.startswith(self._end_of_turn, turn_end):
                end = turn_end + len(self._end_of_turn)
            ranges.append((len(opening), end))
        return tuple(ranges)

    @cached_property
    def _end_of_turn(self) -> str:
        return end_of_turn(self.tokenizer)

    @cached_property
    def _answer_suffix(self) -> str:
        return answer_suffix(self.tokenizer)

    @cached_property
    def _supports_system_message(self) -> bool:
        return supports_system_message(self.tokenizer)
