"""A persona and what was said so far as a prompt, in every template, shortened by whole turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.prompts.templates import (
    Message,
    Template,
    chat_prompt,
    render,
    shows_system,
    turn_end,
)
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_example

_REQUEST = "Give the next reply of the person called You in this conversation, true to the persona.\n\n"
_CHAT_PERSONA = "Reply as the person of whom this is true: "


@dataclass(frozen=True)
class DialoguePrompts:
    """Prompts in one template for one tokenizer.

    A history is what was said, the partner first and last: an odd number of texts. A turn is two of them.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase

    def fitting(
        self, persona: Sequence[str], history: Sequence[str], replies: Sequence[str], max_length: int
    ) -> tuple[str, list[str]]:
        """The prompt, and each reply as it follows it, with the oldest turns left out until both have ``max_length`` tokens.

        Raises ValueError when persona, the partner's last text and a reply are too long on their own.
        """
        for start in range(0, len(history), 2):
            prompt, answers = self.render(persona, history[start:], replies)
            if not tokenize_example(self.tokenizer, prompt, self._longest(answers), max_length, **self._special)[2]:
                return prompt, answers
        raise ValueError(
            f"persona, the partner's last text and a reply have more than max_length {max_length} tokens"
        )

    def render(
        self, persona: Sequence[str], history: Sequence[str], replies: Sequence[str]
    ) -> tuple[str, list[str]]:
        """The prompt for a reply, and the text of each reply as it follows the prompt.

        plain is ``Persona: …``, then ``Partner: …`` and ``You: …`` line by line; alpaca has the same as an instruction; chat
        has the persona as system message, or before the first user message where a template shows none. Raises ValueError for
        an unknown template.
        """
        if self.template == "chat":
            prompt, lead = self._chat(persona, history)
            return prompt, [lead + reply for reply in replies]
        lines = [f"Persona: {' '.join(persona)}"] if persona else []
        lines += [f"{('You' if place % 2 else 'Partner')}: {text}" for place, text in enumerate(history)]
        if self.template == "plain":
            return "\n".join([*lines, "You:"]), [f" {reply}" for reply in replies]
        return render(self.template, _REQUEST + "\n".join(lines), replies)

    def _chat(self, persona: Sequence[str], history: Sequence[str]) -> tuple[str, str]:
        about = _CHAT_PERSONA + " ".join(persona) if persona else ""
        texts, messages = list(history), list[Message]()
        if about and self._shows_system:
            messages.append({"role": "system", "content": about})
        elif about:
            texts[0] = f"{about}\n\n{texts[0]}"
        messages += [
            {"role": "assistant" if place % 2 else "user", "content": text}
            for place, text in enumerate(texts)
        ]
        return chat_prompt(self.tokenizer, messages)

    def _longest(self, answers: Sequence[str]) -> list[str]:
        """The answers that may need the most room: behind a prompt, a boundary may add or save a token."""
        if len(answers) == 1:
            return list(answers)
        counts = [len(self.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers]
        return [answer for answer, count in zip(answers, counts, strict=True) if count >= max(counts) - 2]

    @cached_property
    def _shows_system(self) -> bool:
        return shows_system(self.tokenizer)

    @cached_property
    def _special(self) -> dict[str, Any]:
        """How a token table will tokenize_example the prompt."""
        return (
            {"special_tokens": False, "turn_end": turn_end(self.tokenizer)} if self.template == "chat" else {}
        )
