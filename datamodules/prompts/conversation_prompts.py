"""Prompts of conversations: an instruction or a chat in any template, truncated by whole turns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.prompts.chat_template import (
    answer_suffix,
    end_of_turn,
    render_chat,
    render_response,
    supports_system_message,
)
from gatera_lightning.datamodules.prompts.conversations import (
    Conversation,
    Instruction,
    PlainText,
)
from gatera_lightning.datamodules.prompts.template_messages import Message
from gatera_lightning.datamodules.prompts.templates import Template, render
from gatera_lightning.datamodules.tokenization.control_tokens import ESCAPE, control_tokens
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

    def render(self, conversation: Conversation, max_length: int) -> Prompt:
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
            return self._render_instruction(conversation)
        if isinstance(conversation, PlainText):
            if ESCAPE in conversation.prompt + conversation.response:
                raise ValueError("the text contains the noncharacter U+FDD0; expected text")
            return Prompt(conversation.prompt, conversation.response)
        system = [message for message in conversation.messages if message["role"] == "system"]
        turns = conversation.messages[len(system) :]
        # The first turn is the assistant's in some chats.
        turn_starts = sorted({0, *(i for i, message in enumerate(turns) if message["role"] == "user")})
        for start in turn_starts:
            messages = [*system, *turns[start:]]
            prompt = self._render_chat(messages, conversation.tools, truncated=start > 0)
            if start == turn_starts[-1] or self._fits(prompt, max_length):
                break
        if self.template == "chat" and self.locate_earlier_responses:
            history = self._history(messages)
            earlier = self._locate_earlier_responses(history, conversation.tools, prompt.text)
            return replace(prompt, earlier_responses=earlier)
        return prompt

    def _render_instruction(self, instruction: Instruction) -> Prompt:
        request, context = instruction.request, instruction.context
        if self.template == "chat":
            content = f"{request}\n\n{context}" if context else request
            response = {"role": "assistant", "content": instruction.response}
            return self._render_chat_template([{"role": "user", "content": content}], response, (), False)
        text, answers = render(
            self.template, request, [instruction.response], self.tokenizer, context=context
        )
        return Prompt(text, answers[0])

    def _fits(self, prompt: Prompt, max_length: int) -> bool:
        options: dict[str, Any] = {}
        if self.template == "chat":
            options = {"special_tokens": False, "answer_suffix": self._answer_suffix}
        tokenized = tokenize_example(self.tokenizer, prompt.text, [prompt.answer], max_length, **options)
        return not tokenized.truncated

    def _render_chat(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, truncated: bool
    ) -> Prompt:
        *history, response = messages
        if self.template == "chat":
            return self._render_chat_template(history, response, tools, truncated)
        if tools or any(_needs_chat_template(message) for message in messages):
            raise ValueError(
                f"template {self.template} has no place for tools, tool_calls and reasoning_content; "
                "accepted template: chat"
            )
        history = [message for message in history if message["content"].strip()]  # an empty system message
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

    def _render_chat_template(
        self,
        history: Sequence[Message],
        response: Message,
        tools: Sequence[dict[str, Any]],
        truncated: bool,
    ) -> Prompt:
        text, answer = render_response(self.tokenizer, self._history([*history, response]), response, tools)
        return Prompt(text, answer, (), truncated)

    def _history(self, messages: Sequence[Message]) -> list[Message]:
        """What precedes the response; the system message is a part of the first request if it has to be."""
        *history, _ = messages
        if len(history) < 2 or history[0]["role"] != "system" or self._supports_system_message:
            return history
        system, first, *others = history
        if not system["content"].strip():
            return [first, *others]
        if first["role"] != "user":
            raise ValueError(
                "the tokenizer's chat template has no system messages, and the assistant speaks first"
            )
        return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *others]

    def _render_plain(self, history: Sequence[Message], response: Message, truncated: bool) -> Prompt:
        text, ranges = "", []
        escape = control_tokens(self.tokenizer).escape
        for message in history:
            text += _PLAIN_SPEAKERS[message["role"]]
            is_response = message["role"] == "assistant"
            content = escape(message["content"], response=is_response)
            if is_response:
                # Earlier responses end in EOS and start with the space before them, like the last one.
                content += self.tokenizer.eos_token
                if message.get("weight") != 0:
                    ranges.append((len(text) - 1, len(text) + len(content)))
            text += content + "\n"
        earlier = tuple(ranges) if self.locate_earlier_responses else ()
        opening = _PLAIN_SPEAKERS["assistant"].rstrip()
        answer = f" {escape(response['content'], response=True)}"
        return Prompt(text + opening, answer, earlier, truncated)

    def _locate_earlier_responses(
        self, history: Sequence[Message], tools: Sequence[dict[str, Any]], text: str
    ) -> tuple[tuple[int, int], ...]:
        """Find the assistant's messages in a rendered chat, each with the token that ends its turn."""
        ranges = []
        for i, message in enumerate(history):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            if _needs_chat_template(message):  # what is learned is more than the content
                opening, content = render_response(self.tokenizer, history[:i], message, tools)
            else:
                opening = render_chat(self.tokenizer, history[:i], tools).text
                content = control_tokens(self.tokenizer).escape(message["content"].strip(), response=True)
            start = text.find(content, len(opening))
            if not text.startswith(opening) or start < 0 or text[len(opening) : start].strip():
                raise ValueError(
                    "train_on every_response: the tokenizer's chat template renders earlier responses "
                    "differently from the last one, so training on them would teach what the model never "
                    "generates; accepted: response, all"
                )
            end = start + len(content)
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


def _needs_chat_template(message: Message) -> bool:
    return message["role"] == "tool" or "tool_calls" in message or "reasoning_content" in message
