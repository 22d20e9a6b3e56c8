"""Prompts of dialogues with a persona, in any template, truncated by whole turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.prompts.chat_template import (
    answer_suffix,
    render_chat,
    supports_system_message,
)
from gatera_lightning.datamodules.prompts.template_messages import Message
from gatera_lightning.datamodules.prompts.templates import Template, render
from gatera_lightning.datamodules.tokenization.control_tokens import control_tokens
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_example

_ALPACA_REQUEST = (
    "Give the next reply of the person called You in this conversation, true to the persona.\n\n"
)
_CHAT_PERSONA = "Reply as the person of whom this is true: "


@dataclass(frozen=True)
class DialoguePrompts:
    """Renders dialogues in one template, for one tokenizer.

    Histories alternate between the partner and the model's side, and start and end with the partner: an odd
    number of texts.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase

    def render(
        self, persona: Sequence[str], history: Sequence[str], replies: Sequence[str], max_length: int
    ) -> tuple[str, list[str]]:
        """Render the prompt for a reply, without the oldest turns if it is too long.

        ``plain`` has a line ``Persona: …``, then ``Partner: …`` and ``You: …``; ``alpaca`` has the same lines
        as an instruction. In ``chat`` the persona is the system message, or part of the first user message if
        the chat template does not support system messages.

        Args:
            persona: Sentences about the model's side.
            history: What was said so far.
            replies: Candidate replies.
            max_length: Maximum number of tokens of the prompt and any reply together.

        Returns:
            The prompt, and each reply as it follows the prompt.

        Raises:
            ValueError: The template is unknown, or the persona, the partner's last text and a reply exceed
                ``max_length``.
        """
        options: dict[str, Any] = {}
        if self.template == "chat":
            options = {"special_tokens": False, "answer_suffix": self._answer_suffix}
        for start in range(0, len(history), 2):
            prompt, answers = self._render(persona, history[start:], replies)
            longest = self._longest(answers)
            if not tokenize_example(self.tokenizer, prompt, longest, max_length, **options).truncated:
                return prompt, answers
        raise ValueError(
            f"the persona, the partner's last text and a reply have more than max_length {max_length} tokens"
        )

    def _render(
        self, persona: Sequence[str], history: Sequence[str], replies: Sequence[str]
    ) -> tuple[str, list[str]]:
        if self.template == "chat":
            prompt, separator = self._render_chat_template(persona, history)
            escape = control_tokens(self.tokenizer).escape
            return prompt, [separator + escape(reply, response=True) for reply in replies]
        lines = [f"Persona: {' '.join(persona)}"] if persona else []
        lines += [f"{('You' if i % 2 else 'Partner')}: {text}" for i, text in enumerate(history)]
        if self.template == "plain":
            escape = control_tokens(self.tokenizer).escape
            prompt = escape("\n".join([*lines, "You:"]))
            return prompt, [f" {escape(reply, response=True)}" for reply in replies]
        return render(self.template, _ALPACA_REQUEST + "\n".join(lines), replies, self.tokenizer)

    def _render_chat_template(self, persona: Sequence[str], history: Sequence[str]) -> tuple[str, str]:
        about = _CHAT_PERSONA + " ".join(persona) if persona else ""
        texts, messages = list(history), list[Message]()
        if about and self._supports_system_message:
            messages.append({"role": "system", "content": about})
        elif about:
            texts[0] = f"{about}\n\n{texts[0]}"
        for i, text in enumerate(texts):
            messages.append({"role": "assistant" if i % 2 else "user", "content": text})
        return render_chat(self.tokenizer, messages)

    def _longest(self, answers: Sequence[str]) -> list[str]:
        """The answers that may be the longest; joining one to a prompt may add or save a token."""
        if len(answers) == 1:
            return list(answers)
        counts = [len(self.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers]
        return [answer for answer, count in zip(answers, counts, strict=True) if count >= max(counts) - 2]

    @cached_property
    def _supports_system_message(self) -> bool:
        return supports_system_message(self.tokenizer)

    @cached_property
    def _answer_suffix(self) -> str:
        return answer_suffix(self.tokenizer)
